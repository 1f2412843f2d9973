"""gettext catalogues, .po and .mo, as entries of msgid and msgstr.

Guarantees: a catalogue is read from bytes in memory, nothing in it is executed (the plural formula is not evaluated).
Refuses (CatalogueError): anything that is no catalogue, with the line where it can be told.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

import polib

MO_MAGIC = 0x950412DE
MAX_MO_ENTRIES = 1_000_000
_CHARSET = re.compile(rb"charset=([\w.:\-]+)", re.IGNORECASE)
_DEFAULT_TEXT = re.compile(r'Default:\s*"(.*)"\s*$', re.DOTALL)


class CatalogueError(ValueError):
    """Bytes that are no gettext catalogue."""


class Entry(NamedTuple):
    """One translated message (a plural gives two)."""

    msgid: str
    msgstr: str
    line: int
    """Line in the .po file, or number of the entry in the .mo file."""
    default: str = ""
    """The English text of a symbolic msgid, from the comment `Default: "…"` (Zope, Plone)."""
    state: str = ""
    """Why it is no translation: fuzzy, obsolete, untranslated; empty when it is one."""


def read_catalogue(data: bytes, is_binary: bool) -> Iterator[Entry]:
    """Entries of a catalogue, without its header."""
    return _read_mo(data) if is_binary else _read_po(data)


def _decode(data: bytes, charset: str) -> str:
    if charset.lower() == "charset":  # the template's "charset=CHARSET"
        charset = "utf-8"
    try:
        return data.decode(charset)
    except (LookupError, UnicodeDecodeError) as error:
        raise CatalogueError(f"not in its charset {charset}") from error


def _read_po(data: bytes) -> Iterator[Entry]:
    if b"\0" in data:
        raise CatalogueError("a NUL character in a .po file")
    charset = _CHARSET.search(data[:4000])
    text = _decode(data.removeprefix(b"\xef\xbb\xbf"), charset.group(1).decode("ascii") if charset else "utf-8")
    if "msgid" not in text:
        raise CatalogueError("no msgid in it")
    try:
        catalogue = polib.pofile(text + "\n")
    except (OSError, ValueError, IndexError, KeyError, AttributeError, UnicodeError) as error:
        raise CatalogueError(" ".join(str(error).split())[:200] or type(error).__name__) from error
    for entry in catalogue:
        default = _DEFAULT_TEXT.search((entry.comment or "").replace("\n", " "))
        state = "obsolete" if entry.obsolete else "fuzzy" if "fuzzy" in entry.flags else ""
        forms = [entry.msgstr_plural[key] for key in sorted(entry.msgstr_plural)] if entry.msgid_plural else []
        for msgid, msgstr in _pair_forms(entry.msgid, entry.msgid_plural, forms or [entry.msgstr]):
            yield Entry(
                msgid,
                msgstr,
                entry.linenum or 0,
                default.group(1).replace('\\"', '"') if default else "",
                state or ("" if msgstr else "untranslated"),
            )


def _pair_forms(singular: str, plural: str, forms: list[str]) -> list[tuple[str, str]]:
    """The singular with the first form, the plural with the last (the only one in languages without plural)."""
    if not plural:
        return [(singular, forms[0])]
    return [(plural, forms[0])] if len(forms) == 1 else [(singular, forms[0]), (plural, forms[-1])]


def _read_mo(data: bytes) -> Iterator[Entry]:
    """https://www.gnu.org/software/gettext/manual/html_node/MO-Files.html"""
    if len(data) < 28:
        raise CatalogueError("too short for a .mo file")
    order = next((o for o in "<>" if struct.unpack_from(f"{o}I", data)[0] == MO_MAGIC), None)
    if order is None:
        raise CatalogueError("no .mo file: wrong first bytes")
    _, count, ids_at, strings_at = struct.unpack_from(f"{order}4I", data, 4)
    if count > MAX_MO_ENTRIES or max(ids_at, strings_at) + 8 * count > len(data):
        raise CatalogueError("a .mo file whose tables lie outside it")

    def text_at(table: int, index: int) -> bytes:
        length, offset = struct.unpack_from(f"{order}2I", data, table + 8 * index)
        if offset + length > len(data):
            raise CatalogueError(f"entry {index} lies outside the .mo file")
        return data[offset : offset + length]

    charset = "utf-8"
    for index in range(count):
        raw_id, raw_text = text_at(ids_at, index), text_at(strings_at, index)
        if not raw_id:
            found = _CHARSET.search(raw_text)
            charset = found.group(1).decode("ascii") if found else charset
            continue
        msgid, _, plural = _decode(raw_id, charset).rpartition("\x04")[2].partition("\0")
        for source, msgstr in _pair_forms(msgid, plural, _decode(raw_text, charset).split("\0")):
            yield Entry(source, msgstr, index, state="" if msgstr else "untranslated")
