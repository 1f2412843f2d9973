"""Foreign text, made fit for a terminal and a log.

Guarantees: `printable` leaves no character that a terminal, a browser or an editor would act upon (control characters,
escape sequences, direction overrides, invisible ones), and no secret; what it gives it leaves as it is. Letters of any
script stay as they are.
"""

from __future__ import annotations

import unicodedata

from cvm_translator.runs.secrets import redact

# Joiners that Persian, Indic scripts and emoji need; they cannot reorder text.
_HARMLESS_FORMAT = {"\u200c", "\u200d"}


def printable(text: object) -> str:
    """The text with every character that acts instead of showing written as an escape such as `\\x1b`, and without
    the secrets that this process knows."""
    plain = redact(str(text))
    if plain.isascii() and plain.isprintable():
        return plain
    return "".join(map(_visible, plain))


def _visible(character: str) -> str:
    category = unicodedata.category(character)
    if category in ("Cc", "Cs", "Zl", "Zp", "Co", "Cn") or (category == "Cf" and character not in _HARMLESS_FORMAT):
        named = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(character)
        code = ord(character)
        return named or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}")
    return character
