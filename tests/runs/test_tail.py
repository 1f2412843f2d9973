"""A tail neither loses nor doubles a line, whatever is done to its file between two looks."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.reliability.rotations import measure_tail
from cvm_translator.runs import tail as tail_module
from cvm_translator.runs.tail import FileTail, generation_paths, rotated_paths

quick = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
NUM_BACKUPS = 30


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs" / "file.log"


def line(number: int) -> bytes:
    return b"2026-03-01 line number %d\n" % number


def numbers(lines: list[bytes]) -> list[int]:
    return [int(text.split()[-1]) for text in lines]


class Writer:
    """Writes numbered lines, and does to the file what log rotation does."""

    def __init__(self, path: Path) -> None:
        self.path, self.number = path, 0
        self.stream = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self) -> None:
        self.stream.write(line(self.number))
        self.number += 1

    def half(self) -> bytes:
        """Writes half a line; returns the rest of it."""
        text = line(self.number)
        self.number += 1
        self.stream.write(text[:14])
        return text[14:]

    def shift(self) -> Path:
        for number in range(NUM_BACKUPS, 0, -1):
            old = self.path.with_name(f"{self.path.name}.{number}")
            if old.exists():
                old.rename(self.path.with_name(f"{self.path.name}.{number + 1}"))
        return self.path.with_name(f"{self.path.name}.1")

    def rename(self) -> None:
        self.path.rename(self.shift())

    def reopen(self) -> None:
        self.stream.close()
        self.stream = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def copy_and_empty(self) -> None:
        shutil.copyfile(self.path, self.shift())
        os.truncate(self.path, 0)


@quick
@given(actions=st.lists(st.sampled_from(["write", "half", "rotate", "copy", "late", "poll"]), max_size=25))
def test_nothing_is_lost_or_doubled(actions: list[str], path: Path) -> None:
    """Any order of writes (whole and half lines), rotations by renaming and by copying, and looks; the looks may be so
    rare that many rotations lie between two. In `late` the writer goes on in the renamed file for a line."""
    for old in path.parent.iterdir():
        old.unlink()
    writer, tail = Writer(path), FileTail(path)
    told = tail.poll_lines()
    for action in actions:
        if action == "write":
            writer.write()
        elif action == "half":
            rest = writer.half()
            told += tail.poll_lines()
            writer.stream.write(rest)
        elif action == "copy":
            writer.copy_and_empty()
        elif action == "poll":
            told += tail.poll_lines()
        else:
            writer.rename()
            if action == "late":
                told += tail.poll_lines()
                writer.write()
            writer.reopen()
        if len(rotated_paths(path)) > 9:  # rotated ones fall off the end once they were seen
            told += tail.poll_lines()
            rotated_paths(path)[0].unlink()
    told += tail.poll_lines()
    assert sorted(numbers(told)) == list(range(writer.number))
    if "late" not in actions:
        assert numbers(told) == list(range(writer.number))
    writer.stream.close()
    tail.close()


@quick
@given(actions=st.lists(st.sampled_from(["write", "rotate", "copy"]), max_size=25))
def test_a_first_look_reads_all_generations_in_order(actions: list[str], path: Path) -> None:
    for old in path.parent.iterdir():
        old.unlink()
    writer = Writer(path)
    for action in actions:
        if action == "write":
            writer.write()
        elif action == "copy":
            writer.copy_and_empty()
        else:
            writer.rename()
            writer.reopen()
    tail = FileTail(path, with_rotated=True)
    assert numbers(tail.poll_lines()) == list(range(writer.number))
    assert numbers([text for part in generation_paths(path) for text in part.read_bytes().splitlines()]) == list(
        range(writer.number)
    )
    writer.write()
    assert numbers(tail.poll_lines()) == [writer.number - 1]
    writer.stream.close()
    tail.close()


def test_a_line_is_told_once_and_only_when_whole(path: Path) -> None:
    tail, told = FileTail(path), []
    data = b"".join(line(number) for number in range(20))
    with open(path, "ab", buffering=0) as stream:
        for begin in range(0, len(data), 7):
            stream.write(data[begin : begin + 7])
            told += tail.poll_lines()
    assert numbers(told) == list(range(20))
    assert tail.poll_lines() == []
    tail.close()


def test_cut_off_in_place(path: Path) -> None:
    """To nothing, to less than was read, and regrown past the old place before anybody looked."""
    path.write_bytes(line(1) + line(2) + b"2026-03-01 li")
    tail = FileTail(path)
    assert numbers(tail.poll_lines()) == [1, 2]
    os.truncate(path, 0)
    assert tail.poll_lines() == []
    path.write_bytes(line(3) + line(4))
    assert numbers(tail.poll_lines()) == [3, 4]
    path.write_bytes(b"".join(line(number) for number in range(10, 40)))  # the same inode, longer than before
    assert numbers(tail.poll_lines()) == list(range(10, 40))
    os.truncate(path, 2 * len(line(10)) + 5)
    assert tail.poll_lines() == []
    with open(path, "ab") as stream:
        stream.write(line(12)[5:] + line(50))
    assert numbers(tail.poll_lines()) == [12, 50]
    tail.close()


def test_a_hole_before_a_line_does_not_hide_it(path: Path) -> None:
    """A writer that does not append leaves zero bytes where the file was cut off."""
    path.write_bytes(line(1))
    tail = FileTail(path)
    assert numbers(tail.poll_lines()) == [1]
    path.write_bytes(bytes(700) + line(2))
    assert numbers(tail.poll_lines()) == [2]
    tail.close()


def test_an_inode_that_is_used_again_is_another_file(path: Path) -> None:
    """Removed and made anew many times: the open file keeps its inode, so a new one cannot pass for it."""
    tail, told = FileTail(path), []
    for number in range(50):
        path.unlink(missing_ok=True)
        path.write_bytes(line(number))
        told += tail.poll_lines()
        if number % 3:
            path.unlink()
            path.write_bytes(line(number + 1000))
            told += tail.poll_lines()
    assert numbers(told) == [value for n in range(50) for value in ([n, n + 1000] if n % 3 else [n])]
    tail.close()


def test_a_file_that_fell_off_the_end_before_it_was_read_out(path: Path) -> None:
    """The one that is open was deleted; its rest, and those that are left of the ones after it, are read."""
    writer = Writer(path)
    path.with_name("file.log.1").write_bytes(line(900))
    tail = FileTail(path)
    writer.write()
    assert numbers(tail.poll_lines()) == [0]
    for _ in range(3):
        writer.write()
        writer.rename()
        writer.reopen()
        writer.write()
    for old in rotated_paths(path)[:2]:  # the one of before, and the one that is open
        old.unlink()
    assert numbers(tail.poll_lines()) == [1, 2, 3, 4, 5, 6]
    writer.stream.close()
    tail.close()


def test_nothing_is_decided_while_files_are_being_renamed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, tail = Writer(path), FileTail(path)
    writer.write()
    tail.poll_lines()
    writer.write()
    writer.rename()
    writer.reopen()
    writer.write()
    real, changes = tail_module._Snapshot.is_current, iter([False, False])
    monkeypatch.setattr(tail_module._Snapshot, "is_current", lambda self: next(changes, None) is None and real(self))
    told = [numbers(tail.poll_lines()) for _ in range(4)]
    assert told == [[1], [], [2], []]
    writer.stream.close()
    tail.close()


def test_the_file_before_is_let_go_of_after_a_while(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer, tail = Writer(path), FileTail(path)
    writer.write()
    tail.poll_lines()
    writer.rename()
    path.write_bytes(line(7))
    assert numbers(tail.poll_lines()) == [7]
    writer.write()
    assert numbers(tail.poll_lines()) == [1]
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + tail_module.LINGER_SECONDS + 1)
    tail.poll_lines()
    writer.write()
    assert tail.poll_lines() == [] and tail._previous is None
    writer.stream.close()
    tail.close()


@pytest.mark.timeout(300)
def test_another_process_rotates_all_the_time(tmp_path: Path) -> None:
    """The quick instance of `python -m benchmarks.reliability.rotations`, which does it 1,000 times."""
    found = measure_tail(tmp_path, num_rotations=60)
    assert (found.lost, found.doubled, found.out_of_order) == (0, 0, 0)
    assert found.num_rotations == 60 and 0 < found.num_copies < 60 and found.num_lines > 100
