"""Pre-flight: what would waste hours is found, and good data passes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from cvm_translator.corpus.records import Pair
from cvm_translator.errors import CorpusError, NoRoomError
from cvm_translator.validation import preflight
from cvm_translator.validation.preflight import (
    check_alignment,
    check_disk,
    check_leakage,
    check_loss_balance,
    check_teacher,
)

PHRASES = [
    ("Datei {name} nicht gefunden", "File {name} not found"),
    ("Die Verbindung zum Server wurde nach 30 Sekunden getrennt.", "The connection to the server was lost after 30 s."),
    ("Abbrechen", "Cancel"),
    ("Passwort", "Password"),
    ("Wählen Sie ein Datum aus dem Kalender", "Select a date from the calendar"),
    ("Es gibt %d neue Nachrichten in Ihrem Postfach", "There are %d new messages in your inbox"),
    ("Seite drucken", "Print page"),
    ("Speichern unter…", "Save as…"),
    ("Dieses Formular wurde bereits am 3. Mai abgeschickt.", "This form was already submitted on 3 May."),
    ("Administrator", "Administrator account"),
]


def pair_up(sources: list[str], targets: list[str]) -> list[Pair]:
    return [Pair(*sides, f"train.tsv:{index + 1}") for index, sides in enumerate(zip(sources, targets, strict=True))]


def make_pairs(size: int) -> tuple[list[str], list[str]]:
    """Pairs in which each phrase comes with a number of its own or, half the time, none."""
    generator = random.Random(3)
    pairs = []
    for _ in range(size):
        source, target = generator.choice(PHRASES)
        second = generator.choice(PHRASES)
        suffix = f" {generator.randint(1, 999)}" if generator.random() < 0.5 else ""
        pairs.append((f"{source}, {second[0]}{suffix}", f"{target}, {second[1]}{suffix}"))
    return [source for source, _ in pairs], [target for _, target in pairs]


def test_a_good_corpus_passes_in_any_order() -> None:
    sources, targets = make_pairs(600)
    check_alignment(pair_up(sources, targets))
    order = random.Random(1).sample(range(600), 600)
    check_alignment(pair_up([sources[i] for i in order], [targets[i] for i in order]))


@pytest.mark.parametrize("offset", [1, -1, 3])
def test_a_shifted_file_is_found_with_its_offset(offset: int) -> None:
    sources, targets = make_pairs(500)
    targets = targets[offset:] + targets[:offset]
    with pytest.raises(CorpusError, match=rf"corpus\.train: from about pair 1 .* shifted by \{-offset:+d};"):
        check_alignment(pair_up(sources, targets))


def test_a_file_shifted_from_the_middle_on_is_found_with_its_place() -> None:
    sources, targets = make_pairs(800)
    del targets[400], sources[-1]
    with pytest.raises(CorpusError, match=r"about pair 401 \(train.tsv:401\) on.*4 blocks.*shifted by -1"):
        check_alignment(pair_up(sources, targets), "corpus.train")


def test_pairs_that_do_not_belong_together_are_found() -> None:
    sources, targets = make_pairs(600)
    random.Random(2).shuffle(targets)
    with pytest.raises(CorpusError, match=r"no more alike than random ones"):
        check_alignment(pair_up(sources, targets))


def test_too_little_to_tell_passes() -> None:
    sources, targets = make_pairs(50)
    check_alignment(pair_up(sources, targets[::-1]))
    check_alignment(pair_up(["ab cd"] * 300, ["ef gh"] * 300))


def test_disjoint_splits_pass() -> None:
    check_leakage({"train": pair_up(["Eins"], ["One"]), "validation": pair_up(["Zwei"], ["Two"]), "test": []})


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("Datei nicht gefunden", "Something else"), r"source 'Datei nicht gefunden' of train \(pair 3\) is in test"),
        (("datei  nicht gefunden!", "Something else"), "source"),
        (("Etwas anderes", "file not found."), "target 'File not found' of train .* in test as well .pair 2"),
    ],
)
def test_a_shared_sentence_or_near_duplicate_on_either_side_is_refused(pair: tuple[str, str], message: str) -> None:
    train = pair_up(["Haus", "Baum", "Datei nicht gefunden"], ["house", "tree", "File not found"])
    test = [Pair("Ganz neu", "All new", ""), Pair(*pair, "")]
    for splits in ({"train": train, "test": test}, {"test": test, "train": train}):
        with pytest.raises(CorpusError, match=message):
            check_leakage(splits)


def test_the_largest_split_is_read_in_chunks_by_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks: list[int] = []

    def map_here(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            chunks.append(len(item))
            yield function(item)

    monkeypatch.setattr(preflight, "map_in_order", map_here)
    monkeypatch.setattr(preflight, "LEAKAGE_CHUNK_PAIRS", 3)
    words = ["eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht"]
    train, test = pair_up(words, [word.upper() + "ER" for word in words]), [Pair("neu", "Siebener", "")]
    with pytest.raises(CorpusError, match=r"target 'SIEBENER' of train \(pair 7\) is in test as well \(pair 1\)"):
        check_leakage({"train": train, "test": test})
    assert chunks == [3, 3, 2]
    check_leakage({"train": train[:6], "test": test})


@pytest.mark.parametrize(
    ("bleu", "teacher_params", "codes"),
    [
        (28.9, 6_500_000, []),
        (9.0, 6_500_000, ["poor_teacher"]),
        (28.9, 60_000_000, ["large_size_gap"]),
        (2.0, 60_000_000, ["poor_teacher", "large_size_gap"]),
    ],
)
def test_teacher(bleu: float, teacher_params: int, codes: list[str]) -> None:
    warnings = check_teacher({"bleu": bleu}, teacher_params, 3_000_000)
    assert [warning.code for warning in warnings] == codes


def test_a_weak_distillation_gradient_names_the_temperature() -> None:
    assert check_loss_balance(12.0, 8000, 0.9, 2.0) == []
    (warning,) = check_loss_balance(7805.0, 8000, 0.07, 6.0)
    assert warning.code == "weak_distillation"
    assert "distillation.temperature 6" in warning.message
    assert "7,805 of 8,000" in warning.message


def test_disk(tmp_path) -> None:
    assert check_disk(tmp_path / "not" / "made" / "yet", 1000) > 1000
    with pytest.raises(NoRoomError, match=r"output_dir .* needs about .* MiB .* free"):
        check_disk(tmp_path, 10**18)
