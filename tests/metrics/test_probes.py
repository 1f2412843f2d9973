"""Degeneration probes, as tables of (source, hypothesis, reference, flagged)."""

from __future__ import annotations

import numpy as np
import pytest

from cvm_translator.metrics.placeholders import find_placeholders
from cvm_translator.metrics.probes import PROBES, can_identify, find_numbers, length_ratios

TABLE = [
    ("empty", "Ja.", "", "Yes.", True),
    ("empty", "Ja.", "  \n", "Yes.", True),
    ("empty", "Ja.", "Yes.", "Yes.", False),
    ("repetition", "Der Hund schläft.", "The dog the dog the dog sleeps.", "The dog sleeps.", True),
    ("repetition", "Nein.", "no no no no no", "No.", True),
    ("repetition", "Nein, nein, nein!", "No, no, no!", "No, no, no!", False),
    ("repetition", "Ha ha ha ha ha", "ha ha ha ha ha", "Ha ha ha ha ha", False),
    ("repetition", "Haus", "hohohohohohohohoho", "House", True),
    ("repetition", "Seite --------------------", "Page --------------------", "Page --------------------", False),
    (
        "repetition",
        "Die Datei und der Ordner",
        "The file and the folder and the rest",
        "The file and the folder",
        False,
    ),
    ("copy", "Datei nicht gefunden.", "Datei nicht gefunden", "File not found.", True),
    ("copy", "Photoshop", "Photoshop", "Photoshop", False),
    ("copy", "...", "...", "---", False),
    ("length_ratio", "Ein kurzer Satz.", "A short sentence." * 4, "A short sentence.", True),
    ("length_ratio", "Ein recht langer Satz mit Inhalt.", "Sentence", "A rather long sentence with content.", True),
    ("length_ratio", "Ja", "Yes, sure", "Yes", False),
    ("length_ratio", "Ein recht langer Satz mit Inhalt.", "", "A rather long sentence with content.", False),
    ("numbers", "Seite 3 von 10", "Page 3 of 10", "Page 3 of 10", False),
    ("numbers", "Seite 3 von 10", "Page 3 of 11", "Page 3 of 10", True),
    ("numbers", "Seite 3 von 10", "Page 3", "Page 3 of 10", True),
    ("numbers", "Das kostet 1.000,50 Euro", "It costs 1,000.50 euros", "It costs 1,000.50 euros", False),
    ("numbers", "Noch 2 Tage", "Two days left", "Two days left", False),
    ("numbers", "Zwei Tage", "2 days", "2 days", False),
    ("numbers", "Zwei Tage", "3 days", "two days", True),
    ("numbers", "{0} von {1}", "{0} of {1}", "{0} of {1}", False),
    ("placeholders", "Datei %(name)s fehlt", "File %(name)s is missing", "File %(name)s is missing", False),
    ("placeholders", "Datei %(name)s fehlt", "File is missing", "File %(name)s is missing", True),
    ("placeholders", "Datei %(name)s fehlt", "File %(Name)s is missing", "File %(name)s is missing", True),
    ("placeholders", "%s von %s", "%s of", "%s of %s", True),
    ("placeholders", "Datei fehlt", "File {0} is missing", "File is missing", True),
    ("placeholders", "100%ig sicher", "100% sure", "100% sure", False),
    ("placeholders", "%d Dateien in {name}", "{name} has %d files", "%d files in {name}", False),
    (
        "wrong_language",
        "Die Datei konnte im Verzeichnis nicht gefunden werden.",
        "Die Datei wurde in diesem Verzeichnis leider nicht gefunden.",
        "The file could not be found in this directory.",
        True,
    ),
    (
        "wrong_language",
        "Die Datei konnte im Verzeichnis nicht gefunden werden.",
        "This directory does not have a file of that name.",
        "The file could not be found in this directory.",
        False,
    ),
    ("wrong_language", "Abbrechen", "Abbrechen", "Cancel", False),
]


@pytest.mark.parametrize(("probe", "source", "hypothesis", "reference", "flagged"), TABLE)
def test_probe(probe: str, source: str, hypothesis: str, reference: str, flagged: bool) -> None:
    mask = PROBES[probe]([source], [hypothesis], [reference], "en")
    assert mask.dtype == np.bool_
    assert mask.tolist() == [flagged]


@pytest.mark.parametrize("probe", PROBES)
def test_a_reference_passes_every_probe_as_its_own_translation(probe: str) -> None:
    sources = ["Die %d Dateien wurden vor 3 Tagen in das Verzeichnis {path} kopiert.", "Ja!"]
    references = ["The %d files were copied to the directory {path} 3 days ago.", "Yes!"]
    assert not PROBES[probe](sources, references, references, "en-GB").any()


def test_numbers_and_placeholders_are_found() -> None:
    assert find_numbers("1.000,5 and 1,000.5 or {0} and 7") == ["10005", "10005", "7"]
    assert find_placeholders("%(name)s {0} {name:.2f} %s %1$s ${x} 50 % sicher") == [
        "%(name)s", "{0}", "{name:.2f}", "%s", "%1$s", "${x}"
    ]  # fmt: skip


def test_length_ratios_have_slack_for_short_text() -> None:
    np.testing.assert_allclose(length_ratios(["", "ab"], ["ten chars.", "ab"]), [0.5, 1.0])


def test_an_unknown_language_is_told_and_not_guessed() -> None:
    assert can_identify("pt_BR")
    assert not can_identify("xx")
    with pytest.raises(ValueError, match="does not know the language 'xx'"):
        PROBES["wrong_language"](["a"], ["a"], ["a"], "xx")
