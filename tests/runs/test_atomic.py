"""Files that are whole, the old one or the new one, whatever happens in between."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from cvm_translator.runs import atomic

OLD = b"the old content"


class Crash(BaseException):
    pass


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "deep" / "file.json"
    atomic.write_bytes(path, OLD)
    return path


def test_a_crash_while_writing_leaves_the_old_file_and_nothing_else(target: Path) -> None:
    def fill(stream: BinaryIO) -> None:
        stream.write(b"half of the new")
        raise Crash

    with pytest.raises(Crash):
        atomic.write_stream(target, fill)
    assert target.read_bytes() == OLD
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_crash_before_the_rename_leaves_the_old_file(
    call: str, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise Crash

    monkeypatch.setattr(os, call, crash)
    with pytest.raises(Crash):
        atomic.write_text(target, "new")
    assert target.read_bytes() == OLD


def test_the_content_is_on_disk_before_the_name_and_the_name_before_the_return(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        order.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def note_replace(source: Path, place: Path) -> None:
        order.append("rename")
        replace(source, place)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    atomic.write_bytes(target, b"new")
    assert order == ["file", "rename", "folder"]


def test_json_that_json_cannot_hold_is_refused_and_the_old_file_stays(target: Path) -> None:
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            atomic.write_json(target, {"value": bad})
    assert target.read_bytes() == OLD


def test_text_and_json_come_back(target: Path) -> None:
    atomic.write_text(target, "a\r\nä\n")
    assert target.read_bytes() == "a\r\nä\n".encode()
    data = {"ü": [1, 2.5, None, True], "path": Path("/x")}
    atomic.write_json(target, data)
    assert atomic.read_json(target) == data | {"path": "/x"}
    assert json.loads(target.read_bytes()) == atomic.read_json(target)


def test_hashes(target: Path) -> None:
    assert atomic.sha256_file(target) == hashlib.sha256(OLD).hexdigest()
    assert atomic.sha256_json({"a": 1, "b": [2]}) == atomic.sha256_json({"b": [2], "a": 1})
    assert atomic.sha256_json({"a": 1}) != atomic.sha256_json({"a": 2})


# -------------------------------------------------------------------------------------------------------- whole folders


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "new"
    with atomic.new_folder(target) as folder:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text("content")
        assert not target.exists()
        assert folder.parent == target.parent
    assert (target / "part" / "file").read_text() == "content"
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("when", ["in the block", "at the rename"])
def test_a_new_folder_that_fails_leaves_nothing(tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise Crash

    if when == "at the rename":
        monkeypatch.setattr(os, "rename", crash)
    with pytest.raises(Crash), atomic.new_folder(tmp_path / "new") as folder:
        (folder / "file").write_text("content")
        if when == "in the block":
            crash()
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_replaces_nothing_that_came_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), atomic.new_folder(tmp_path / "new") as folder:
        (folder / "file").write_text("content")
        (tmp_path / "new").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert list((tmp_path / "new").iterdir()) == []
