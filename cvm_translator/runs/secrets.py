"""Secrets: where they may come from, and that they appear nowhere.

Guarantees: a secret is read from an environment variable or a file, never from a command line or a config; its object
shows its origin instead of its value; and `redact` puts `[redacted]` in its place in any text, also where only a
telling part of it stands there (the path of a URL, a token in it) or where it is quoted. A process has one list of
secrets, for a secret must not leak through a part that has never heard of it: whatever shows or writes text passes it
through.
"""

from __future__ import annotations

import json
import os
import re
import urllib.parse
from pathlib import Path

from cvm_translator.errors import ConfigError

REDACTED = "[redacted]"
MIN_TELLING_LENGTH = 8
"""Shorter parts of a secret are not looked for by themselves: they would be found in ordinary text."""

_needles: list[str] = []


class Secret:
    """A secret value; `str` and `repr` name only where it came from."""

    def __init__(self, value: str, origin: str) -> None:
        self._value = value
        self.origin = origin
        add_secret(value)

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return f"<secret from {self.origin}>"

    __str__ = __repr__

    def __reduce__(self) -> str:
        raise TypeError("a secret is not pickled")


def read_secret_variable(name: str) -> Secret:
    """The secret in an environment variable. Raises ConfigError, which names only the variable."""
    value = os.environ.get(name, "").strip()
    if not value:
        raise ConfigError(f"environment variable {name} is not set: export it, or keep the secret in a file")
    return Secret(value, f"${name}")


def read_secret_file(path: Path) -> Secret:
    """The secret in a file of one line. Raises ConfigError, which names only the file."""
    try:
        value = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read as a secret ({type(error).__name__}): name a file of one line"
        ) from None
    if not value or len(value.splitlines()) != 1:
        raise ConfigError(f"{path} does not hold a secret: put it there as its only line")
    return Secret(value, str(path))


def add_secret(value: str) -> None:
    """Have `redact` look for a value, its quoted forms and its telling parts from now on."""
    found = {value, *_telling_parts(value)}
    for part in list(found):
        found |= {urllib.parse.quote(part), urllib.parse.quote(part, safe=""), urllib.parse.quote_plus(part)}
        found |= {urllib.parse.unquote(part), json.dumps(part)[1:-1], repr(part)[1:-1]}
        found |= {json.dumps(part, ensure_ascii=False)[1:-1]}
    _needles[:] = sorted({*_needles, *filter(None, found)}, key=len, reverse=True)


def _telling_parts(value: str) -> set[str]:
    """Of a URL: what comes after the host, the user and password, and each token; of other text: nothing more."""
    try:
        parts = urllib.parse.urlsplit(value)
    except ValueError:
        return set()
    if not parts.scheme or not parts.netloc:
        return set()
    tail = value.split(parts.netloc, 1)[1].strip("/")
    pieces = {tail, parts.path.strip("/"), parts.query, parts.fragment, parts.username or "", parts.password or ""}
    tokens = {
        token for piece in (tail, parts.username or "", parts.password or "") for token in re.split("[/?&=#]", piece)
    }
    return {piece for piece in pieces if len(piece) >= MIN_TELLING_LENGTH} | {t for t in tokens if _is_telling(t)}


def _is_telling(token: str) -> bool:
    """Whether a part of a URL looks like a token rather than a word."""
    is_word = token.isalpha() and token.islower()
    return len(token) >= (2 * MIN_TELLING_LENGTH if is_word else MIN_TELLING_LENGTH)


def redact(text: str) -> str:
    """The text without any secret that this process has read."""
    for needle in _needles:
        if needle in text:
            text = text.replace(needle, REDACTED)
    return text
