"""One holder per run folder: the lock has one winner, dies with its holder, and names it."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cvm_translator.errors import RunFolderError
from cvm_translator.runs.lock import RunLock, process_start_time, read_holder, waited_lock

CONTENDER = """
import sys
from pathlib import Path
from cvm_translator.errors import RunFolderError
from cvm_translator.runs.lock import RunLock
sys.stdin.readline()
try:
    with RunLock(Path(sys.argv[1])):
        print("won", flush=True)
        sys.stdin.readline()
except RunFolderError as error:
    print(error, flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "run.lock"


@pytest.fixture
def contenders(path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Twenty processes that ask for the lock at their first line of input and hold it until their second."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(20)
    ]
    yield started
    for process in started:
        process.kill()
        process.communicate()


def test_one_of_twenty_wins_and_the_others_are_told_who_holds_it(
    contenders: list[subprocess.Popen[str]], path: Path
) -> None:
    for process in contenders:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = {process.pid: process.stdout.readline() for process in contenders if process.stdout}
    (winner,) = [pid for pid, answer in answers.items() if answer == "won\n"]
    holder = read_holder(path)
    assert holder is not None
    assert (holder["pid"], holder["host"]) == (winner, socket.gethostname())
    assert holder["process_start_time"] == process_start_time(winner)
    refusals = [answer for pid, answer in answers.items() if pid != winner]
    assert len(refusals) == 19
    assert all(f"{path.parent} is in use by process" in refusal for refusal in refusals)
    # The text is written after the lock is taken, so a loser of the very first instant may not know the name yet.
    assert any(f"by process {winner} on {socket.gethostname()} since 20" in refusal for refusal in refusals)

    os.kill(winner, signal.SIGKILL)  # the lock dies with its holder, though its text stays
    next(process for process in contenders if process.pid == winner).wait()
    assert read_holder(path) is None
    assert json.loads(path.read_text())["pid"] == winner
    with RunLock(path):
        holder = read_holder(path)
        assert holder is not None
        assert holder["pid"] == os.getpid()


def test_a_released_lock_is_free_and_empty(path: Path) -> None:
    lock = RunLock(path)
    lock.acquire(stage="distil")
    assert json.loads(path.read_text())["stage"] == "distil"
    with pytest.raises(RunFolderError, match=f"in use by process {os.getpid()} .* choose another --output-dir"):
        RunLock(path).acquire()
    lock.release()
    lock.release()
    assert path.read_text() == ""
    assert read_holder(path) is None
    with RunLock(path):
        pass


def test_nobody_holds_what_is_not_there(path: Path) -> None:
    assert read_holder(path) is None
    assert not path.parent.exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_stale_or_foreign_text_blocks_nobody(text: str, path: Path) -> None:
    path.parent.mkdir()
    path.write_text(text)
    assert read_holder(path) is None
    with RunLock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_readers_do_not_turn_a_holder_away(path: Path) -> None:
    """Someone who looks whether the lock is free holds it for an instant; `acquire` asks again."""
    path.parent.mkdir()
    looker = "import sys\nfrom pathlib import Path\nfrom cvm_translator.runs.lock import read_holder\n"
    looker += "print('looking', flush=True)\nwhile True:\n    read_holder(Path(sys.argv[1]))\n"
    path.write_text("")
    with subprocess.Popen([sys.executable, "-c", looker, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            end = time.monotonic() + 0.3
            while time.monotonic() < end:
                with RunLock(path):
                    pass
        finally:
            process.kill()


def test_start_times_tell_processes_apart() -> None:
    assert process_start_time(os.getpid()) is not None
    assert process_start_time(2**22 + 1) is None


WAITER = """
import sys, time
from pathlib import Path
from cvm_translator.runs.lock import waited_lock
path, log = Path(sys.argv[1]), Path(sys.argv[2])
for _ in range(20):
    with waited_lock(path, lambda: None):
        begin = time.monotonic_ns()
        time.sleep(0.002)
        with open(log, "a") as stream:
            stream.write(f"{begin} {time.monotonic_ns()}\\n")
"""


def test_those_who_wait_come_one_after_the_other_and_leave_no_file(tmp_path: Path) -> None:
    lock, log = tmp_path / "file.lock", tmp_path / "log"
    processes = [subprocess.Popen([sys.executable, "-c", WAITER, str(lock), str(log)]) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0, 0, 0, 0]
    spans = sorted(tuple(map(int, line.split())) for line in log.read_text().splitlines())
    assert len(spans) == 80
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert not lock.exists()


def test_a_wait_may_be_given_up(tmp_path: Path) -> None:
    def give_up() -> None:
        raise TimeoutError

    with waited_lock(tmp_path / "lock", give_up):
        with pytest.raises(TimeoutError), waited_lock(tmp_path / "lock", give_up):
            pass
        assert (tmp_path / "lock").exists()


def test_a_lock_whose_holder_found_no_room_to_be_named_is_free_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the same process, which goes on: a supervisor that waits for room."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", refuse)
        with pytest.raises(OSError, match="No space left"):
            RunLock(path).acquire()
    assert read_holder(path) is None
    with RunLock(path):
        assert (read_holder(path) or {})["pid"] == os.getpid()
