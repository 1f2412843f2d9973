"""Filters: each drops what it names, in order, and lets good text through."""

from __future__ import annotations

import pytest

from cvm_translator.config.schema import CleaningConfig
from cvm_translator.corpus.cleaning import FILTERS, Cleaner, build_language_check
from cvm_translator.corpus.records import Pair

GOOD = ("Die Datei wurde nicht gefunden.", "The file was not found.")


def clean(*pairs: tuple[str, str], **settings: object) -> tuple[list[Pair], dict[str, int]]:
    cleaner = Cleaner(CleaningConfig(**settings), "de", "en")
    kept = [cleaner.clean(Pair(source, target, "t:1")) for source, target in pairs]
    return [pair for pair in kept if pair is not None], dict(cleaner.counts)


def test_text_is_normalised() -> None:
    kept, counts = clean(("Die\u00a0Tu\u0308r\u200b  ist\toffen \x07", "\ufeffThe door\nis open"))
    assert kept == [Pair("Die Tür ist offen", "The door is open", "t:1")]
    assert counts == {}


@pytest.mark.parametrize(
    ("source", "target", "reason"),
    [
        ("\u200b", "x", "empty_after_normalisation"),
        ("Wort " * 121, "word " * 121, "too_long"),
        ("x" * 601, "y" * 601, "too_long"),
        ("Ja", "This is a very long explanation of a yes", "length_ratio"),
        ("12:30", "12.30", "no_letters"),
        ("Status", "STATUS", "identical"),
        ("Datei %s fehlt", "File is missing", "placeholders_differ"),
        ("Datei %(name)s fehlt", "File %(nam)s is missing", "placeholders_differ"),
        (GOOD[1], GOOD[0], "wrong_language"),
        ("Le fichier demandé n'a pas été trouvé.", GOOD[1], "wrong_language"),
    ],
)
def test_each_filter(source: str, target: str, reason: str) -> None:
    kept, counts = clean((source, target))
    assert kept == [] and counts == {reason: 1}
    assert reason in FILTERS


def test_duplicates() -> None:
    kept, counts = clean(
        GOOD,
        GOOD,
        ("Die Datei wurde NICHT gefunden!", "The file was not found"),
        ("Die Datei wurde nicht gefunden.", "File not found."),  # another translation stays
    )
    assert [pair.target for pair in kept] == [GOOD[1], "File not found."]
    assert counts == {"exact_duplicate": 1, "near_duplicate": 1}


def test_short_texts_and_switched_off_filters_pass() -> None:
    assert len(clean(("OK", "All right"), ("Name", "Titel"), ("Kiste", "Box"))[0]) == 3
    assert len(clean(("Status", "Status"), drop_identical=False)[0]) == 1
    assert len(clean(GOOD[::-1], language_check=False)[0]) == 1
    assert len(clean(("Ja", "This is a very long explanation of a yes"), max_length_ratio=100.0)[0]) == 1


def test_a_language_that_nobody_knows_is_not_judged() -> None:
    check = build_language_check("xx", "en")
    assert not check("whatever this may be in that language", "Die Datei wurde nicht gefunden und fehlt.")
