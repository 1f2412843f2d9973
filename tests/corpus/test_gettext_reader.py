"""gettext catalogues: which are read, what of them, and in which direction."""

from __future__ import annotations

import gettext
import io
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import polib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvm_translator.config.schema import GettextSource
from cvm_translator.corpus.catalogues import CatalogueError, read_catalogue
from cvm_translator.corpus.gettext_reader import choose_catalogues, is_symbolic
from cvm_translator.corpus.readers import ReaderContext, read_source
from cvm_translator.corpus.records import BadRow, Pair, Record, Skipped
from cvm_translator.errors import CorpusError

from .conftest import make_mo_bytes, make_po

MakeContext = Callable[..., ReaderContext]

ENTRIES = [
    polib.POEntry(msgid="_Open file", msgstr="Datei ö_ffnen"),
    polib.POEntry(msgid="Delete %(count)s files?", msgstr="%(count)s Dateien löschen?", msgctxt="button"),
    polib.POEntry(msgid="One file", msgid_plural="%d files", msgstr_plural={0: "Eine Datei", 1: "%d Dateien"}),
    polib.POEntry(msgid="Fuzzy thing", msgstr="Etwas", flags=["fuzzy"]),
    polib.POEntry(msgid="Not translated", msgstr=""),
    polib.POEntry(msgid="Gone", msgstr="Weg", obsolete=True),
    polib.POEntry(msgid="label_size", msgstr="Größe", comment='Default: "Size of the page"'),
    polib.POEntry(msgid="label_unknown", msgstr="Unbekannt"),
    polib.POEntry(
        msgid='Read the <a href="x">manual</a> &amp; smile.', msgstr="Das <b>Handbuch</b> lesen &amp; lachen."
    ),
    polib.POEntry(msgid='<img src="a.png"><br>x', msgstr='<img src="a.png"><br>y'),
]


def read(context: ReaderContext, path: Path, **keys: object) -> list[Record]:
    return list(read_source(GettextSource(format="gettext", path=path, **keys), context))


def texts(records: list[Record]) -> list[tuple[str, str]]:
    return [(record.source, record.target) for record in records if isinstance(record, Pair)]


@pytest.fixture
def catalogue(tmp_path: Path) -> Path:
    folder = tmp_path / "locale" / "de" / "LC_MESSAGES"
    folder.mkdir(parents=True)
    make_po(ENTRIES).save(str(folder / "app.po"))
    return folder / "app.po"


def test_entries_of_a_po_file(catalogue: Path, make_context: MakeContext) -> None:
    records = read(make_context(), Path("locale"))
    assert texts(records) == [
        ("Datei öffnen", "Open file"),
        ("%(count)s Dateien löschen?", "Delete %(count)s files?"),
        ("Eine Datei", "One file"),
        ("%d Dateien", "%d files"),
        ("Größe", "Size of the page"),
        ("Das Handbuch lesen & lachen.", "Read the manual & smile."),
    ]
    assert Counter(record.reason for record in records if isinstance(record, Skipped)) == {
        "fuzzy": 1,
        "untranslated": 1,
        "obsolete": 1,
        "symbolic_msgid": 1,
        "markup": 1,
    }
    assert records[0].origin.startswith("locale/de/LC_MESSAGES/app.po:")


def test_the_other_direction(catalogue: Path, make_context: MakeContext) -> None:
    records = read(make_context(source_language="en", target_language="de"), Path("locale"))
    assert texts(records)[0] == ("Open file", "Datei öffnen")


def test_mo_files_equal_gettext_of_the_standard_library(tmp_path: Path, make_context: MakeContext) -> None:
    data = make_mo_bytes(make_po(ENTRIES))
    (tmp_path / "app_de.mo").write_bytes(data)
    reference = gettext.GNUTranslations(io.BytesIO(data))
    entries = list(read_catalogue(data, is_binary=True))
    assert len(entries) == 8  # without the header and what is fuzzy, untranslated or obsolete; a plural counts twice
    for entry in entries:
        if entry.msgid == "%d files":
            assert entry.msgstr == reference.ngettext("One file", "%d files", 2)
        elif entry.msgid.startswith("Delete"):
            assert entry.msgstr == reference.pgettext("button", entry.msgid)
        else:
            assert entry.msgstr == reference.gettext(entry.msgid)
    assert ("Datei öffnen", "Open file") in texts(read(make_context(), Path("app_de.mo")))


def test_po_goes_before_mo_and_the_plain_locale_before_regions() -> None:
    names = [
        "a/locale/de/LC_MESSAGES/x.mo",
        "a/locale/de/LC_MESSAGES/x.po",
        "a/locale/de_AT/LC_MESSAGES/x.po",
        "a/locale/de_Informal/LC_MESSAGES/x.po",
        "b/locales/de_AT/LC_MESSAGES/y.mo",
        "b/locales/de_DE/LC_MESSAGES/y.mo",
        "i18n/plone-de.po",
        "po/de.po",
        "po/nde.po",
        "po/nl.po",
        "p-1.0.data/data/share/locale/de/LC_MESSAGES/z.mo",
    ]
    assert choose_catalogues(names, "de") == [
        "a/locale/de/LC_MESSAGES/x.po",
        "b/locales/de_DE/LC_MESSAGES/y.mo",
        "i18n/plone-de.po",
        "p-1.0.data/data/share/locale/de/LC_MESSAGES/z.mo",
        "po/de.po",
    ]


@pytest.mark.parametrize("msgid", ["label_file", "menu.open", "heading_a-b"])
def test_symbolic_msgids(msgid: str) -> None:
    assert is_symbolic(msgid)


@pytest.mark.parametrize("msgid", ["Open", "Open...", "Name:", "Open file_name", "_File", "Datei…"])
def test_text_is_not_symbolic(msgid: str) -> None:
    assert not is_symbolic(msgid)


def test_a_language_that_is_not_there_is_an_error(catalogue: Path, make_context: MakeContext) -> None:
    with pytest.raises(CorpusError, match=r"no gettext catalogue for language 'fr' \(it has: de\)"):
        read(make_context(source_language="fr"), Path("locale"))


def test_a_pair_without_the_msgid_language_is_an_error(catalogue: Path, make_context: MakeContext) -> None:
    with pytest.raises(CorpusError, match="msgid_language 'en' is neither"):
        read(make_context(target_language="fr"), Path("locale"))


def test_a_named_file_that_is_no_catalogue_is_an_error(tmp_path: Path, make_context: MakeContext) -> None:
    (tmp_path / "de.po").write_text("nothing of the kind")
    with pytest.raises(CorpusError, match=r"de\.po is no gettext catalogue"):
        read(make_context(), Path("de.po"))


def test_an_unreadable_catalogue_among_others_is_quarantined(
    catalogue: Path, tmp_path: Path, make_context: MakeContext
) -> None:
    (catalogue.parent / "broken.mo").write_bytes(b"\xde\x12\x04\x95" + b"\xff" * 40)
    records = read(make_context(), Path("locale"))
    assert [record.reason for record in records if isinstance(record, BadRow)] == ["unreadable_catalogue"]
    assert len(texts(records)) == 6


@settings(max_examples=80, deadline=None)
@given(data=st.binary(max_size=200), position=st.integers(0, 600), value=st.integers(0, 255))
def test_no_bytes_crash_the_catalogue_readers(data: bytes, position: int, value: int) -> None:
    damaged = bytearray(make_mo_bytes(make_po(ENTRIES)))
    damaged[position % len(damaged)] = value
    text = bytearray(str(make_po(ENTRIES)).encode())
    text[position % len(text)] = value
    for candidate, is_binary in ((data, True), (bytes(damaged), True), (data, False), (bytes(text), False)):
        try:
            entries = list(read_catalogue(candidate, is_binary))
        except CatalogueError:
            continue
        assert all(isinstance(entry.msgid, str) and isinstance(entry.msgstr, str) for entry in entries)
