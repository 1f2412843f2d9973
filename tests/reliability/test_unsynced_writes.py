"""The quick instance of benchmarks/reliability/unsynced_writes.py, its model of a disk; and that it can fail."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from benchmarks.common import BenchmarkError
from benchmarks.reliability import disk_model, unsynced_writes
from benchmarks.reliability.disk_model import list_states, list_unsynced, read_tree, record
from cvm_translator.checkpoints import folder, store
from cvm_translator.runs import atomic


def run(*arguments: str) -> dict:
    return unsynced_writes.run_benchmark(unsynced_writes.build_parser().parse_args(arguments))


def test_a_save_cut_off_anywhere_loses_nothing(tmp_path: Path) -> None:
    """A new best, whose save also removes old checkpoints."""
    data = run("--num-random", "0", "--scenario", "1", "--work", str(tmp_path))
    assert {check: found for check, found in data["failures"].items() if found} == {}
    (row,) = data["scenarios"]
    assert row["num_points"] > 30
    assert row["num_states"] > 200
    assert "holds: a valid checkpoint is found" in unsynced_writes.format_results(data)


def test_a_store_that_syncs_no_folder_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (folder, store):
        monkeypatch.setattr(module, "fsync_directory", lambda path: None)
    data = run("--num-random", "0", "--scenario", "1", "--work", str(tmp_path))
    assert data["failures"][unsynced_writes.COMMITTED]


# ------------------------------------------------------------------------------------------------ the model of a disk


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "old").write_bytes(b"old")
    return tmp_path / "root"


def write(path: Path, data: bytes, *, sync: bool) -> None:
    with open(path, "wb") as stream:
        stream.write(data)
        stream.flush()
        if sync:
            os.fsync(stream.fileno())


def trees(root: Path, action, num_random: int = 200) -> list[dict]:
    """All that may be left once the action is done."""
    *_, unsynced = list_unsynced(record(root, action))
    return [disk.tree() for disk in list_states(unsynced, random.Random(1), num_random)]


def test_what_was_synced_stays(root: Path) -> None:
    def action() -> None:
        write(root / "new", b"new", sync=True)
        atomic.fsync_directory(root)

    assert trees(root, action) == [{"old": b"old", "new": b"new"}] * 2


def test_a_synced_file_may_lose_its_name(root: Path) -> None:
    found = trees(root, lambda: write(root / "new", b"new", sync=True))
    assert {"old": b"old"} in found
    assert all(tree.get("new", b"new") == b"new" for tree in found)


def test_an_unsynced_content_may_be_anything(root: Path) -> None:
    def action() -> None:
        write(root / "new", b"content", sync=False)
        atomic.fsync_directory(root)

    contents = {tree["new"] for tree in trees(root, action)}
    assert {b"", b"content", bytes(7), b"cont"} <= contents
    assert len(contents) > 20


def test_changes_of_names_are_lost_one_by_one_and_reordered(root: Path) -> None:
    def action() -> None:
        os.rename(root / "old", root / "older")
        os.mkdir(root / "old")
        os.symlink("old", root / "link")

    found = trees(root, action)
    for expected in (
        {"old": b"old"},
        {"older": b"old", "old": {}, "link": "-> old"},
        {"older": b"old"},
        {"old": b"old", "link": "-> old"},
        {"old": {}},
        {"older": b"old", "link": "-> old"},
    ):
        assert expected in found


def test_removals_are_recorded_too(root: Path) -> None:
    (root / "folder").mkdir()
    (root / "folder" / "file").write_bytes(b"file")
    found = trees(root, lambda: shutil.rmtree(root / "folder"))
    assert {"old": b"old"} in found
    assert {"old": b"old", "folder": {"file": b"file"}} in found
    assert {"old": b"old", "folder": {}} in found
    assert read_tree(root) == {"old": b"old"}


def test_what_escapes_the_recording_is_an_error(root: Path) -> None:
    with pytest.raises(BenchmarkError, match="escaped the recording"):
        record(root, lambda: os.close(os.open(root / "new", os.O_CREAT)))
    with pytest.raises(BenchmarkError, match="in place"):
        record(root, lambda: write(root / "old", b"", sync=True))
    assert os.fsync.__module__ == "posix"
    assert open is disk_model.builtins.open
