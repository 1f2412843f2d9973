"""systemd's protocol on real sockets, watchdog pings that stop with the heartbeat, and the unit that asks for them."""

from __future__ import annotations

import os
import shlex
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cvm_translator.cli import main
from cvm_translator.daemon.notify import Notifier
from cvm_translator.daemon.unit import quote


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A service manager's socket, and its address as NOTIFY_SOCKET names it."""
    name = f"@cvm-{uuid.uuid4().hex}" if request.param == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("\0" + name[1:] if name.startswith("@") else name)
        receiver.settimeout(30)
        yield receiver, name


def drain(receiver: socket.socket) -> list[str]:
    receiver.setblocking(False)
    messages = []
    try:
        while True:
            messages.append(receiver.recv(4096).decode())
    except BlockingIOError:
        return messages


def test_messages_arrive(manager: tuple[socket.socket, str]) -> None:
    receiver, address = manager
    Notifier({"NOTIFY_SOCKET": address}).send("READY=1", "STATUS=distil step 3 — ü")
    assert receiver.recv(4096).decode() == "READY=1\nSTATUS=distil step 3 — ü"


def test_pings_come_twice_as_often_as_asked_for(manager: tuple[socket.socket, str], monkeypatch: Any) -> None:
    receiver, address = manager
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "10000000", "WATCHDOG_PID": str(os.getpid())})
    for _ in range(21):
        notifier.ping()
        now[0] += 1.0
    assert drain(receiver) == ["WATCHDOG=1"] * 5


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"NOTIFY_SOCKET": "/nowhere/at/all", "WATCHDOG_USEC": "1"},
        {"NOTIFY_SOCKET": "", "WATCHDOG_USEC": "many"},
        {"NOTIFY_SOCKET": "x" * 300, "WATCHDOG_USEC": "-1"},
    ],
)
def test_nobody_to_tell_is_no_error(environment: dict[str, str]) -> None:
    notifier = Notifier(environment)
    notifier.send("READY=1")
    notifier.status("at step 1")
    notifier.ping()


def test_a_supervisor_tells_and_pings_while_the_trainer_is_well(
    manager: tuple[socket.socket, str], supervised: Any
) -> None:
    receiver, address = manager
    sent: list[tuple[float, str]] = []

    class Timed(Notifier):
        def send(self, *lines: str) -> None:
            sent.append((time.monotonic(), lines[0]))
            super().send(*lines)

    received: list[str] = []

    def receive() -> None:
        while not received or received[-1] != "STOPPING=1":
            received.append(receiver.recv(4096).decode())

    reading = supervised.meanwhile(receive)
    notifier = Timed({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "200000"})
    assert supervised.supervise("deaf,exit0", supervised.impatient, notifier=notifier) == 0
    reading.join(30)
    assert [message.split("\n")[0] for message in received] == [line for _, line in sent]
    restarted = next(at for at, line in sent if "it is started again" in line)
    pings = [at for at, line in sent if line == "WATCHDOG=1" and at < restarted]
    assert pings
    assert any(line == "READY=1" and at < restarted for at, line in sent)
    # A hung trainer had half a second to leave, and none of it looked healthy.
    assert restarted - pings[-1] >= supervised.impatient.grace_seconds


def test_the_trainer_inherits_no_socket(manager: tuple[socket.socket, str], supervised: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager[1])
    monkeypatch.setattr("subprocess.Popen", lambda command, env, **_: pytest.fail(f"{'NOTIFY_SOCKET' in env}"))
    with pytest.raises(pytest.fail.Exception, match="False"):
        supervised.supervise("on")


# ------------------------------------------------------------------------------------------------------------ the unit


def test_the_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text("corpus: {train: [{format: tsv, path: t.tsv}]}\noutput_dir: my run\n")
    assert main(["service-unit", "mine.yaml", "--set", "seed=7"]) == 0
    settings = dict(line.split("=", 1) for line in capsys.readouterr().out.splitlines() if "=" in line)
    assert settings["Type"] == "notify"
    assert (settings["KillMode"], settings["KillSignal"]) == ("mixed", "SIGTERM")
    assert (settings["Restart"], settings["OOMPolicy"]) == ("on-abnormal", "continue")
    assert int(settings["WatchdogSec"]) > 0 and int(settings["TimeoutStopSec"]) > 0
    command = shlex.split(settings["ExecStart"])
    assert command[1:4] == ["-m", "cvm_translator", "start"]
    config, *options = command[4:]
    assert (config, settings["WorkingDirectory"]) == (str(tmp_path / "mine.yaml"), str(tmp_path))
    assert options == ["--set", "seed=7", "--output-dir", str(tmp_path / "my run"), "--foreground", "--no-progress"]


def test_the_unit_of_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("corpus: {train: [{format: tsv, path: t.tsv}]}\n")
    assert main(["service-unit", str(tmp_path)]) == 0
    assert f"start {tmp_path}/config.yaml --output-dir {tmp_path} --foreground" in capsys.readouterr().out
    assert main(["service-unit", str(tmp_path / "config")]) == 1


@pytest.mark.parametrize(
    ("word", "quoted"),
    [("a/b.yaml", "a/b.yaml"), ("my run", '"my run"'), ("50%", '"50%%"'), ("$HOME", '"$$HOME"'), ('a"b', '"a\\"b"')],
)
def test_words_are_literal(word: str, quoted: str) -> None:
    assert quote(word) == quoted
