"""Accelerators, markup, keys."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cvm_translator.corpus.text import (
    make_key,
    normalise_text,
    strip_accelerators,
    strip_markup,
)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("&Datei", "&File", ("Datei", "File")),
        ("Datei ö_ffnen", "_Open file", ("Datei öffnen", "Open file")),
        ("Daten &löschen", "Delete data", ("Daten löschen", "Delete data")),
        ("user_id fehlt", "user_id is missing", ("user_id fehlt", "user_id is missing")),
        ("Fragen & Antworten", "Q&A", ("Fragen & Antworten", "Q&A")),
        ("F&A", "Q&A", ("F&A", "Q&A")),
        ("%(a_b)s fehlt", "%(a_b)s is missing", ("%(a_b)s fehlt", "%(a_b)s is missing")),
        ("Suchen && &ersetzen", "Find && &replace", ("Suchen & ersetzen", "Find & replace")),
    ],
)
def test_accelerators(source: str, target: str, expected: tuple[str, str]) -> None:
    assert strip_accelerators(source, target) == expected


def test_markup() -> None:
    assert strip_markup('Das <a href="%(url)s">Handbuch</a><br/>lesen') == ("Das Handbuch lesen", 27)
    assert strip_markup("Titel ========") == ("Titel  ", 0)
    assert strip_markup("<Name> &lt;b&gt; &amp;") == ("<Name> <b> &", 0)


def test_keys_ignore_what_near_duplicates_differ_in() -> None:
    assert make_key("Die Datei %(name)s fehlt!") == make_key("die DATEI {0} fehlt") == "die datei fehlt"
    assert make_key("Zeile 12") == make_key("Zeile 345:")
    assert make_key("3 / 4") == "3 / 4"
    assert make_key("Straße") == make_key("STRASSE")


@given(st.text(max_size=80))
def test_normalised_text_is_one_clean_line(text: str) -> None:
    once = normalise_text(text)
    assert normalise_text(once) == once
    assert unicodedata.is_normalized("NFC", once)
    assert once == once.strip() and len(once.splitlines()) <= 1 and "\t" not in once


@pytest.mark.parametrize("unit", ["<a ", "{{ ", "%(", "&", "_a ", "{", "a.", "$", "<", "%1", "${a"])
def test_hostile_repetitions_end(unit: str) -> None:
    """Anything quadratic would run into the test's time limit."""
    text = unit * (300_000 // len(unit))
    assert strip_markup(text)[1] >= 0
    assert make_key(text)
    assert strip_accelerators(text, text[:-1])
