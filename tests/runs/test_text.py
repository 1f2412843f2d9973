"""Foreign text shows and never acts on a terminal."""

from __future__ import annotations

import pytest

from benchmarks.reliability.hostile_pages import PAYLOADS
from cvm_translator.runs import secrets
from cvm_translator.runs.text import printable

HOSTILE = [
    *PAYLOADS,
    "\x1b[31mred\x1b[0m\x07",
    "line\nbreak\r\ttab",
    "\x9b31m\x90q\x9c\x9d0;owned\x07",
    "\u202egnp.exe \u2066x\u2069 \u200fmark \ufeff",
    "\u0085\u2028\u2029 \ud800",
    "100 % of {0} and %(name)s",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_that_acts_is_left(text: str) -> None:
    shown = printable(text)
    assert all(character.isprintable() for character in shown)
    assert shown.encode("utf-8")
    assert printable(shown) == shown


def test_every_script_stays() -> None:
    text = "Grüße, 你好, مرحبا, नमस्ते क्\u200dष, 👩\u200d🔧"
    assert printable(text) == text


def test_secrets_are_struck_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_needles", [])
    secrets.add_secret("s3cr3t-t0ken")
    assert printable("it said s3cr3t-t0ken\x1b") == "it said [redacted]\\x1b"
