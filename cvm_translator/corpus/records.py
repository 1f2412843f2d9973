"""What readers yield: a pair of texts, a malformed row, or an entry left out on purpose.

Guarantees: `sound_text` decides in one place what no text may contain (NUL, lone surrogates), for all readers.
"""

from __future__ import annotations

from typing import NamedTuple

EXCERPT_LENGTH = 120


class Pair(NamedTuple):
    """A sentence and its translation, with the place they came from (`file:line`)."""

    source: str
    target: str
    origin: str


class BadRow(NamedTuple):
    """A row that could not be read; it goes to the quarantine file."""

    origin: str
    reason: str
    excerpt: str


class Skipped(NamedTuple):
    """An entry that is sound but no translation (untranslated, fuzzy, obsolete …); it is counted by its reason."""

    origin: str
    reason: str


Record = Pair | BadRow | Skipped


def make_excerpt(raw: bytes | str) -> str:
    """The beginning of a row, printable, on one line."""
    text = raw[: 4 * EXCERPT_LENGTH].decode("utf-8", "replace") if isinstance(raw, bytes) else raw
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:EXCERPT_LENGTH])


def find_defect(text: str) -> str | None:
    """The reason why `text` can be no sentence, or None."""
    if "\0" in text:
        return "nul_character"
    if not text.strip():
        return "empty_side"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "invalid_utf8"
    return None


def make_pair(source: object, target: object, origin: str) -> Pair | BadRow:
    """A pair if both sides are sound text, else the row to quarantine."""
    if not isinstance(source, str) or not isinstance(target, str):
        return BadRow(origin, "not_text", make_excerpt(f"{source!r} / {target!r}"))
    defect = find_defect(source) or find_defect(target)
    if defect:
        return BadRow(origin, defect, make_excerpt(f"{source} / {target}"))
    return Pair(source, target, origin)
