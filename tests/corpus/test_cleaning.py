"""Filters: each drops what it names, in order, and lets good text through."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from cvm_translator.config.schema import CleaningConfig
from cvm_translator.corpus.cleaning import FILTERS, Rules, build_language_check, find_duplicates, judge_pair
from cvm_translator.corpus.records import Pair

GOOD = ("Die Datei wurde nicht gefunden.", "The file was not found.")


def clean(*pairs: tuple[str, str], **settings: object) -> tuple[list[Pair], dict[str, int]]:
    rules = Rules(CleaningConfig(**settings), "de", "en")
    judged = [judge_pair(Pair(source, target, "t:1"), rules) for source, target in pairs]
    return [pair for pair in judged if isinstance(pair, Pair)], Counter(
        name for name in judged if isinstance(name, str)
    )


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


def test_of_equal_pairs_the_first_stays() -> None:
    exact, nearly = np.array([7, 5, 7, 6, 8, 5], np.uint64), np.array([1, 2, 1, 2, 3, 2], np.uint64)
    dropped = find_duplicates(exact, nearly)
    assert {name: places.tolist() for name, places in dropped.items()} == {
        "exact_duplicate": [2, 5],
        "near_duplicate": [3],
    }
    nothing = np.empty(0, np.uint64)
    assert not any(len(places) for places in find_duplicates(nothing, nothing).values())


def test_short_texts_and_switched_off_filters_pass() -> None:
    assert len(clean(("OK", "All right"), ("Name", "Titel"), ("Kiste", "Box"))[0]) == 3
    assert len(clean(("Status", "Status"), drop_identical=False)[0]) == 1
    assert len(clean(GOOD[::-1], language_check=False)[0]) == 1
    assert len(clean(("Ja", "This is a very long explanation of a yes"), max_length_ratio=100.0)[0]) == 1


def test_a_side_in_a_language_that_nobody_knows_is_not_judged_but_the_other_is() -> None:
    check = build_language_check("xx", "en")
    assert not check("was auch immer das in dieser Sprache heissen mag", "The file was not found and is missing.")
    assert check("whatever this may be in that language", "Die Datei wurde nicht gefunden und fehlt.")
    neither = build_language_check("xx", "yy")
    assert not neither("whatever this may be in that language", "Die Datei wurde nicht gefunden und fehlt.")


def test_a_region_makes_no_other_language() -> None:
    check = build_language_check("pt_BR", "de-AT")
    german = "Die Datei wurde in diesem Ordner nicht gefunden."
    assert not check("O ficheiro não foi encontrado na pasta do utilizador.", german)
    assert check("The file was not found in the folder of the user.", german)
