"""A secret comes from a variable or a file, and is seen nowhere."""

from __future__ import annotations

import copy
import json
import pickle
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from cvm_translator.errors import ConfigError
from cvm_translator.runs import secrets
from cvm_translator.runs.events import EventWriter, read_events
from cvm_translator.runs.secrets import Secret, read_secret_file, read_secret_variable, redact

TOKEN = "xCanaryTok3n/With+Signs="
URL = f"https://user:pa55wordCanary@hooks.example.org/services/T0CANARY1/{TOKEN}?key=QueryCanary99&x=1"


@pytest.fixture(autouse=True)
def _no_other_secrets(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(secrets, "_needles", [])
    yield


def test_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOOK", f" {URL}\n")
    secret = read_secret_variable("HOOK")
    assert (secret.reveal(), secret.origin) == (URL, "$HOOK")
    monkeypatch.setenv("HOOK", " ")
    with pytest.raises(ConfigError, match="HOOK is not set"):
        read_secret_variable("HOOK")


@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines", b"\xff\xfe", None])
def test_a_file_that_holds_none_is_refused_by_name(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "hook"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)) as error:
        read_secret_file(path)
    assert "two" not in str(error.value)


def test_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "hook").write_text(URL + "\n")
    assert read_secret_file(tmp_path / "hook").reveal() == URL


def test_the_object_shows_its_origin_only() -> None:
    secret = Secret(URL, "$HOOK")
    for shown in (str(secret), repr(secret), f"{secret}", repr([secret])):
        assert "CANARY" not in shown and "$HOOK" in shown
    with pytest.raises(TypeError):
        pickle.dumps(secret)
    with pytest.raises(TypeError):
        copy.copy(secret)


@pytest.mark.parametrize(
    "text",
    [
        URL,
        f"cannot reach {URL}: refused",
        json.dumps({"url": URL}),
        repr(URL),
        urllib.parse.quote(URL, safe=""),
        urllib.parse.quote(URL),
        f"GET /services/T0CANARY1/{TOKEN} HTTP/1.1",
        f"path {urllib.parse.urlsplit(URL).path} not found",
        "bad token T0CANARY1",
        "bad token xCanaryTok3n",
        "login failed for pa55wordCanary",
        "?key=QueryCanary99",
    ],
)
def test_no_part_of_it_is_left(text: str) -> None:
    Secret(URL, "$HOOK")
    shown = redact(text)
    assert "canary" not in shown.lower()
    assert "[redacted]" in shown


def test_events_and_their_listeners_never_hold_it(tmp_path: Path) -> None:
    """A secret with signs that JSON escapes, in values, keys and lists."""
    for value in (URL, 'canary "quoted" \\ Grüße\t1'):
        Secret(value, "$HOOK")
        heard: list[object] = []
        with EventWriter(tmp_path / "events.jsonl") as events:
            events.listeners.append(heard.append)
            events.write("warning", message=f"cannot reach {value}", details={value: [value]}, step=3)
    text = (tmp_path / "events.jsonl").read_text() + repr(heard)
    assert "canary" not in text.lower() and text.count("[redacted]") == 9
    assert [event["step"] for event in read_events(tmp_path / "events.jsonl")] == [3, 3]


def test_ordinary_text_stays() -> None:
    Secret(URL, "$HOOK")
    text = "the services at https://hooks.example.org are listed with key and x=1, user 7"
    assert redact(text) == text
    Secret("short7", "$TOKEN")
    assert redact("a short7 b") == "a [redacted] b"
