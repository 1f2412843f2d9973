"""What a run relies on when it carries on: only whole checkpoints load, and a crash at any point loses none."""

from __future__ import annotations

import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cvm_translator.checkpoints import CheckpointStore, DiskFullError, checkpoint_name, load_checkpoint
from cvm_translator.errors import CheckpointError


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the store may catch it."""


class Trainer:
    """A small real training state that fills a store."""

    def __init__(self, directory: Path, keep: int = 3) -> None:
        self.lines: list[str] = []
        self.store = CheckpointStore(directory, keep, report=self.lines.append)
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 3)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        self.step()

    def step(self) -> None:
        self.model(torch.randn(2, 4)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step: int, attempt: int = 1, is_best: bool = False, note: str = "") -> Path:
        return self.store.save(
            step,
            attempt,
            tensors={"model": self.model.state_dict(), "ema": self.model.state_dict()},
            torch_states={"optimizer": self.optimizer.state_dict(), "rng": {"torch": torch.get_rng_state()}},
            plain={"step": step, "loss": [0.1, float("inf")], "note": note, "best": None},
            is_best=is_best,
        ).path


def links(directory: Path) -> dict[str, str]:
    return {path.name: os.readlink(path) for path in directory.iterdir() if path.is_symlink()}


def folders(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.is_symlink()}


def test_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    saved = trainer.save(10, is_best=True, note="üñ\ud800")
    assert saved == tmp_path / "checkpoint_10"
    loaded = trainer.store.load("latest")
    assert (loaded.path, loaded.step, loaded.attempt, loaded.is_best) == (saved.resolve(), 10, 1, True)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(loaded.tensors["model"][name], tensor)
        assert torch.equal(loaded.tensors["ema"][name], tensor)
    assert loaded.plain == {"step": 10, "loss": [0.1, float("inf")], "note": "üñ\ud800", "best": None}
    expected = trainer.optimizer.state_dict()
    state = loaded.torch_states["optimizer"]
    assert state["param_groups"] == expected["param_groups"]
    assert all(torch.equal(state["state"][i][k], expected["state"][i][k]) for i in (0, 1) for k in expected["state"][i])
    trainer.step()
    after = [parameter.clone() for parameter in trainer.model.parameters()]
    other = Trainer(tmp_path)
    other.model.load_state_dict(loaded.tensors["model"])
    other.optimizer.load_state_dict(state)
    torch.set_rng_state(loaded.torch_states["rng"]["torch"])
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(after, other.model.parameters(), strict=True))


def test_tied_and_strided_tensors_are_saved_by_value(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    table = torch.arange(12.0).reshape(3, 4)
    tensors = {"model": {"embedding": table, "output": table, "turned": table.T, "row": table[1]}}
    trainer.store.save(1, 1, tensors=tensors, torch_states={}, plain={}, is_best=False)
    loaded = trainer.store.load("checkpoint_1").tensors["model"]
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors["model"].items())


@pytest.mark.parametrize(
    ("torch_states", "plain", "place"),
    [
        ({}, {"a": {"b": (1, 2)}}, "plain.a.b is a tuple"),
        ({}, {"history": [{1: 2}]}, "plain.history[0] has the key 1"),
        ({}, {"seed": torch.tensor(1)}, "plain.seed is a Tensor"),
        ({"rng": {"python": random.Random(1)}}, {}, "rng['python'] is a Random"),
        ({"../rng": {}}, {}, "'../rng' is not a usable name"),
    ],
)
def test_state_that_would_not_come_back_is_refused_when_saved(
    tmp_path: Path, torch_states: dict[str, Any], plain: dict[str, Any], place: str
) -> None:
    trainer = Trainer(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        trainer.store.save(1, 1, tensors={}, torch_states=torch_states, plain=plain, is_best=False)
    assert place in str(caught.value)
    assert folders(tmp_path) == set()


# ------------------------------------------------------------------------------------------------------------ damage


def damaged_copies(path: Path, scratch: Path, damage: Callable[[random.Random, bytes], bytes]) -> Iterator[str]:
    """200 times: damage one file of the checkpoint (each file in turn), yield its name, and mend it again."""
    rng = random.Random(3)
    shutil.copytree(path, scratch)
    names = sorted(file.name for file in scratch.iterdir())
    for trial in range(200):
        file = scratch / names[trial % len(names)]
        whole = file.read_bytes()
        file.write_bytes(damage(rng, whole))
        yield file.name
        file.write_bytes(whole)
    load_checkpoint(scratch)


def flip_a_bit(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.choice([0, len(data) - 1, rng.randrange(len(data))])]


@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
def test_each_damaged_file_is_refused_by_name(tmp_path: Path, damage: Callable[[random.Random, bytes], bytes]) -> None:
    path = Trainer(tmp_path / "store").save(7)
    for name in damaged_copies(path, tmp_path / "checkpoint_7", damage):
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(tmp_path / "checkpoint_7")


def test_every_bit_of_the_manifest_counts(tmp_path: Path) -> None:
    path = Trainer(tmp_path).save(7, is_best=True)
    whole = (path / "manifest.json").read_bytes()
    for place in range(len(whole)):
        flipped = bytes([whole[place] ^ (1 << place % 8)])
        (path / "manifest.json").write_bytes(whole[:place] + flipped + whole[place + 1 :])
        with pytest.raises(CheckpointError, match="checkpoint_7"):
            load_checkpoint(path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "state.json", "manifest.json"])
def test_a_missing_file_is_refused(tmp_path: Path, name: str) -> None:
    path = Trainer(tmp_path).save(7)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path)


def test_the_newest_valid_one_is_used_and_each_bad_one_named(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, keep=5)
    for step in (1, 2, 3, 4):
        trainer.save(step, is_best=step in (2, 4))
    for name in ("checkpoint_3", "checkpoint_4"):
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    again = Trainer(tmp_path)
    loaded = again.store.load_newest_valid()
    assert loaded is not None
    assert loaded.step == 2
    assert [
        name for line in again.lines for name in ("checkpoint_3", "checkpoint_4") if f"{name} is damaged" in line
    ] == [
        "checkpoint_4",
        "checkpoint_3",
    ]
    assert links(tmp_path) == {"latest": "checkpoint_2", "best_model": "checkpoint_2"}
    again.save(3)
    assert again.store.load("checkpoint_3").step == 3


def test_none_is_for_no_checkpoints_and_an_error_for_none_valid(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    assert trainer.store.load_newest_valid() is None
    (trainer.save(1) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints .*checkpoint_1"):
        Trainer(tmp_path).store.load_newest_valid()


def test_a_missing_checkpoint_is_named_with_those_present(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.save(1)
    with pytest.raises(CheckpointError, match=r"best_model; present: checkpoint_1"):
        trainer.store.load("best_model")


# ------------------------------------------------------------------------------------------------- names and retention


def test_a_newer_attempt_is_newer_whatever_its_step(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.save(9000)
    trainer.save(10_000)
    trainer.save(3000, attempt=2)
    assert trainer.store.names() == ["checkpoint_3000.attempt_2", "checkpoint_10000", "checkpoint_9000"]
    loaded = Trainer(tmp_path).store.load_newest_valid()
    assert loaded is not None
    assert (loaded.step, loaded.attempt) == (3000, 2)


def test_names() -> None:
    assert checkpoint_name(1000, 1) == "checkpoint_1000"
    assert checkpoint_name(1000, 3) == "checkpoint_1000.attempt_3"


def test_retention_keeps_the_newest_the_best_and_the_protected(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, keep=2)
    trainer.store.protect("checkpoint_2")
    for step in range(1, 8):
        trainer.save(step, is_best=step == 3)
    assert folders(tmp_path) == {"checkpoint_2", "checkpoint_3", "checkpoint_6", "checkpoint_7"}
    assert links(tmp_path) == {"latest": "checkpoint_7", "best_model": "checkpoint_3"}
    trainer.store.unprotect("checkpoint_2")
    trainer.save(8, is_best=True)
    assert folders(tmp_path) == {"checkpoint_7", "checkpoint_8"}


def test_a_damaged_checkpoint_does_not_count_among_the_newest(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, keep=2)
    for step in (1, 2):
        trainer.save(step)
    (tmp_path / "checkpoint_2" / "state.json").unlink()
    again = Trainer(tmp_path, keep=2)
    again.save(3)
    assert folders(tmp_path) == {"checkpoint_1", "checkpoint_2", "checkpoint_3"}


def test_a_replayed_step_replaces_its_checkpoint_or_leaves_an_equal_one(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    path = trainer.save(1)
    inode = path.stat().st_ino
    trainer.save(1)
    assert path.stat().st_ino == inode
    trainer.save(1, note="other", is_best=True)
    assert path.stat().st_ino != inode
    assert trainer.store.load("best_model").plain["note"] == "other"
    assert folders(tmp_path) == {"checkpoint_1"}


# ----------------------------------------------------------------------------------------------------- crash, no room


SYSTEM_CALLS = ("fsync", "rename", "replace", "symlink", "unlink", "rmdir", "mkdir")


def kill_at(monkeypatch: pytest.MonkeyPatch, number: int, killed_before: bool) -> list[str]:
    """Let the process die just before or just after its `number`-th change to the disk; the calls made are returned."""
    calls: list[str] = []

    def wrap(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(calls) >= number:
                raise Killed
            calls.append(name)
            if len(calls) == number and killed_before:
                raise Killed
            result = original(*args, **kwargs)
            if len(calls) == number:
                raise Killed
            return result

        return call

    for name in SYSTEM_CALLS:
        monkeypatch.setattr(os, name, wrap(name, getattr(os, name)))
    return calls


def save_until_killed(directory: Path, is_replay: bool, number: int, killed_before: bool) -> bool:
    """Save step 4 (anew, or over one of an earlier process) and die at a call; False when the save was done before."""
    trainer = Trainer(directory, keep=2)
    for step in (1, 2, 3, 4) if is_replay else (1, 2, 3):
        trainer.save(step, is_best=step == 2, note="old")
    with pytest.MonkeyPatch.context() as monkeypatch:
        calls = kill_at(monkeypatch, number, killed_before)
        try:
            trainer.save(4, is_best=True, note="new")
        except Killed:
            return True
    assert len(calls) < number
    return False


@pytest.mark.parametrize("killed_before", [True, False])
@pytest.mark.parametrize("is_replay", [False, True])
def test_killed_at_every_write_point(tmp_path: Path, is_replay: bool, killed_before: bool) -> None:
    for number in range(1, 200):
        directory = tmp_path / str(number)
        was_killed = save_until_killed(directory, is_replay, number, killed_before)
        again = Trainer(directory, keep=2)
        loaded = again.store.load_newest_valid()
        assert loaded is not None
        assert loaded.step == 4 or (loaded.step == 3 and not is_replay), number
        best = again.store.load("best_model")
        assert best.step == (4 if loaded.plain["note"] == "new" else 2), number
        assert links(directory)["latest"] == loaded.path.name
        assert not [name for name in folders(directory) if name.startswith(".")], number
        again.save(5)
        assert folders(directory) == {"checkpoint_4", "checkpoint_5", links(directory)["best_model"]} - (
            set() if loaded.step == 4 else {"checkpoint_4"}
        ) | ({"checkpoint_3"} if loaded.step == 3 else set())
        shutil.rmtree(directory)
        if not was_killed:
            assert number > 15
            return
    pytest.fail("the save never ended")


def test_everything_is_durable_before_anything_points_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut could reorder: files, manifest, folder; then the name; then the links; then old ones go."""
    trainer = Trainer(tmp_path, keep=2)
    for step in (1, 2):
        trainer.save(step)
    trace: list[str] = []
    fsync, rename, replace = os.fsync, os.rename, os.replace
    files = {"model.safetensors", "ema.safetensors", "optimizer.pt", "rng.pt", "state.json"}
    monkeypatch.setattr(
        os, "fsync", lambda fd: (trace.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))
    )
    monkeypatch.setattr(os, "rename", lambda a, b: (trace.append(f"-> {Path(b).name}"), rename(a, b)))
    monkeypatch.setattr(os, "replace", lambda a, b: (trace.append(f"-> {Path(b).name}"), replace(a, b)))
    trainer.save(3, is_best=True)
    assert set(trace[:5]) == files
    assert trace[5:] == [
        "manifest.json",
        ".tmp-checkpoint_3",
        "-> checkpoint_3",
        tmp_path.name,
        "-> latest",
        tmp_path.name,
        "-> best_model",
        tmp_path.name,
        "-> .tmp-removed-checkpoint_1",
        tmp_path.name,
    ]


def test_no_room_at_any_size_leaves_the_old_checkpoints(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path)
    trainer.save(1, is_best=True)
    largest = max(file.stat().st_size for file in (tmp_path / "checkpoint_1").iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in range(0, largest, 61):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(DiskFullError, match=r"no room in .* for the checkpoint of step 2"):
                trainer.save(2, is_best=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert folders(tmp_path) == {"checkpoint_1"}
    assert trainer.store.load("latest").step == 1
    trainer.save(2)
    assert trainer.store.load("latest").step == 2


FILL_A_DISK = """
import sys
from pathlib import Path
import torch
from cvm_translator.checkpoints import CheckpointStore, DiskFullError
directory = Path(sys.argv[1])
state = {"tensors": {"model": {"weight": torch.ones(1000)}}, "torch_states": {"optimizer": {"step": 1}}, "plain": {}}
for step in range(1, 30):
    names = CheckpointStore(directory, report=print).names()
    try:
        CheckpointStore(directory, keep=30, report=print).save(step, 1, is_best=False, **state)
    except DiskFullError as error:
        assert "No space left on device" in str(error), error
        loaded = CheckpointStore(directory, report=print).load_newest_valid()
        assert loaded.step == step - 1 > 2, step
        assert sorted(path.name for path in directory.iterdir()) == sorted([*names, "latest"])
        print("survived")
        break
"""


def test_a_full_disk_leaves_the_old_checkpoints(tmp_path: Path) -> None:
    """On a real small disk, mounted for one process only."""
    unshare = ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this system lets no process have mounts of its own")
    script = 'mount -t tmpfs -o size=96k tmpfs "$1" && exec "$2" -c "$3" "$1"'
    command = [*unshare, "sh", "-c", script, "sh", str(tmp_path), sys.executable, FILL_A_DISK]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout == "survived\n", done.stderr
