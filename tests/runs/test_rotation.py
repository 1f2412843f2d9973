"""Logs that rotate by size, and what is left when the disk or the folder is not."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cvm_translator.runs.rotation import QuietRotatingHandler, rotate_copy
from cvm_translator.runs.tail import FileTail, generation_paths


def test_a_log_rotates_and_keeps_as_many_as_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    handler = QuietRotatingHandler(path, maxBytes=200, backupCount=2)
    tail, told = FileTail(path), []
    for number in range(60):
        handler.emit(logging.makeLogRecord({"msg": f"line number {number:04}"}))
        told += tail.poll_lines() if number % 7 == 0 else []
    handler.close()
    told += tail.poll_lines()
    tail.close()
    assert [int(line.split()[-1]) for line in told] == list(range(60))
    assert [part.name for part in generation_paths(path)] == ["train.log.2", "train.log.1", "train.log"]
    assert all(part.stat().st_size <= 200 for part in generation_paths(path))


def test_a_log_that_cannot_be_written_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = QuietRotatingHandler(tmp_path / "train.log", maxBytes=20, backupCount=1)
    (tmp_path / "train.log.1").mkdir()
    (tmp_path / "train.log.1" / "in the way").touch()
    for number in range(5):
        handler.emit(logging.makeLogRecord({"msg": f"line number {number:04}"}))
    handler.close()
    assert capsys.readouterr() == ("", "")


def test_the_log_of_another_process_is_copied_and_emptied(tmp_path: Path) -> None:
    """Its standard output stays open for appending, as that of a background process does."""
    path = tmp_path / "daemon.log"
    code = "import sys\nfor line in sys.stdin: print(line.strip(), flush=True)"
    with open(path, "ab") as log:
        child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=log, text=True)
    assert child.stdin is not None
    tail, told = FileTail(path), []
    for number in range(40):
        before = path.stat().st_size
        child.stdin.write(f"said {number:04}\n")
        child.stdin.flush()
        while path.stat().st_size == before:
            time.sleep(0.001)
        told += tail.poll_lines() if number % 9 == 0 else []
        assert rotate_copy(path, 45, 3) == (number % 5 == 4)
    child.stdin.close()
    assert child.wait(timeout=30) == 0
    told += tail.poll_lines()
    tail.close()
    assert [int(line.split()[-1]) for line in told] == list(range(40))
    assert sorted(part.name for part in tmp_path.iterdir()) == ["daemon.log", *(f"daemon.log.{n}" for n in (1, 2, 3))]


def test_nothing_is_done_where_nothing_can_be(tmp_path: Path) -> None:
    assert not rotate_copy(tmp_path / "gone" / "daemon.log", 1, 1)
    (tmp_path / "daemon.log").write_text("abc")
    assert not rotate_copy(tmp_path / "daemon.log", 3, 1)
    (tmp_path / "daemon.log.1").mkdir()
    assert not rotate_copy(tmp_path / "daemon.log", 2, 1)
    assert (tmp_path / "daemon.log").read_text() == "abc"
    assert not list(tmp_path.glob(".tmp-*"))
