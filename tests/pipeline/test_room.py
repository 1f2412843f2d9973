"""Room on the disk: what is asked for before the first step, the teacher's stored states included, and want of it."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cvm_translator.cli import find_exit_code
from cvm_translator.config import DistillationConfig
from cvm_translator.config.schema import ModelConfig
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.errors import EXIT_ERROR, EXIT_NO_ROOM, NoRoomError
from cvm_translator.pipeline.distiller import ModelDistiller
from cvm_translator.pipeline.preflight import check_room
from cvm_translator.pipeline.student import check_room_for_stored, choose_stored
from cvm_translator.runs import atomic
from cvm_translator.runs.events import read_events
from cvm_translator.runs.heartbeat import Heartbeat
from cvm_translator.runs.layout import RunLayout
from cvm_translator.teachers.states import StoredTeacher, TeacherStates, TeacherTopTargets
from cvm_translator.training import device

DIM = 16
NEEDED = 20 * 6 * DIM * 2
OWN_BYTES = 5000


@pytest.fixture
def dataset() -> DistillationDataset:
    generator = np.random.default_rng(3)
    sources = [generator.integers(4, 24, 5).tolist() for _ in range(20)]
    return DistillationDataset(sources, sources)


@pytest.fixture
def teacher() -> Any:
    config = ModelConfig(dim=DIM, num_heads=2)
    return SimpleNamespace(sha256="abc", model=SimpleNamespace(config=config, vocab_size=100))


def make_context(root: Path, notes: list[str], *, precision: str = "bfloat16", **teacher: Any) -> Any:
    model = {"dim": DIM, "num_heads": 2}
    config = DistillationConfig(
        distillation={"precision": precision}, teacher={"model": model, **teacher}, student={"model": model}
    )
    layout = RunLayout(root)
    return SimpleNamespace(config=config, layout=layout, device=torch.device("cpu"), note=notes.append)


def choose(context: Any, teacher: Any, dataset: DistillationDataset, num_epochs: float = 10.0) -> StoredTeacher | None:
    return choose_stored(context, teacher, dataset, num_epochs, OWN_BYTES)


def test_states_that_are_not_there_yet_need_room(tmp_path: Path, dataset: DistillationDataset, teacher: Any) -> None:
    context = make_context(tmp_path, [])
    stored = choose(context, teacher, dataset)
    assert isinstance(stored, TeacherStates)
    assert check_room_for_stored(context, stored) == NEEDED
    stored.file.path.parent.mkdir(parents=True)
    stored.file.path.write_bytes(b"\0" * NEEDED)
    stored.file.path.with_name(stored.file.path.name + ".json").write_text("{}")
    assert check_room_for_stored(context, stored) == 0


def set_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))


@pytest.mark.parametrize(("cache", "needed"), [(None, NEEDED + OWN_BYTES), ("cache", NEEDED)])
def test_states_that_find_no_room_give_way_to_the_teacher(
    cache: str | None,
    needed: int,
    tmp_path: Path,
    dataset: DistillationDataset,
    teacher: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    notes: list[str] = []
    context = make_context(tmp_path / "run", notes, cache_dir=cache and tmp_path / cache)
    set_free(monkeypatch, needed)
    stored = choose(context, teacher, dataset)
    assert isinstance(stored, TeacherStates) and not notes
    set_free(monkeypatch, needed - 1)
    assert choose(context, teacher, dataset) is None
    assert "MiB are free in" in notes[0] and "the teacher runs at each step" in notes[0]
    part = stored.file.path.with_name(stored.file.path.name + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(b"\1" * NEEDED)  # what an earlier start has written is not asked for again
    assert isinstance(choose(context, teacher, dataset), TeacherStates)


def test_targets_that_were_asked_for_have_no_way_out(
    tmp_path: Path, dataset: DistillationDataset, teacher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context(tmp_path / "run", [], cache_dir=tmp_path / "cache", top_k=8)
    stored = choose(context, teacher, dataset)
    assert check_room_for_stored(context, stored) == 0
    set_free(monkeypatch, 999)
    with pytest.raises(NoRoomError, match="make room"):
        check_room_for_stored(context, stored)


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_states_that_training_would_not_round_to_are_not_stored(
    precision: str, tmp_path: Path, dataset: DistillationDataset, teacher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_native_bfloat16", lambda _: False)
    notes: list[str] = []
    assert choose(make_context(tmp_path, notes, precision=precision), teacher, dataset) is None
    (note,) = notes
    assert f"distillation.precision {precision}" in note and ("no bfloat16" in note) == (precision == "auto")


def test_states_over_the_budget_need_none(tmp_path: Path, dataset: DistillationDataset, teacher: Any) -> None:
    notes: list[str] = []
    context = make_context(tmp_path, notes)
    teacher.model.config = ModelConfig(dim=2**29, num_heads=2)
    assert choose(context, teacher, dataset) is None
    assert "over teacher.states_budget_mib" in notes[0]


def test_states_do_not_pay_for_one_epoch(tmp_path: Path, dataset: DistillationDataset, teacher: Any) -> None:
    assert choose(make_context(tmp_path, []), teacher, dataset, num_epochs=1.0) is None
    assert check_room_for_stored(make_context(tmp_path, []), None) == 0


def test_top_targets_are_stored_where_they_are_asked_for(
    tmp_path: Path, dataset: DistillationDataset, teacher: Any
) -> None:
    stored = choose(make_context(tmp_path, [], top_k=8, states_budget_mib=1), teacher, dataset, num_epochs=1.0)
    assert isinstance(stored, TeacherTopTargets) and stored.file.num_bytes == 20 * 6 * 8 * 4


def test_room_is_asked_for_before_the_first_step_only(tmp_path: Path) -> None:
    """A training that has checkpoints goes on, and pauses where it finds no room."""
    context = make_context(tmp_path, [])
    with pytest.raises(NoRoomError, match="make room"):
        check_room(context, context.layout.checkpoints, 1 << 60)
    (context.layout.checkpoints / "checkpoint_0").mkdir(parents=True)
    check_room(context, context.layout.checkpoints, 1 << 60)


def make_config(root: Path) -> Any:
    return make_context(root, []).config.model_copy(update={"output_dir": root, "num_threads": 1})


def refuse(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_start_that_finds_no_room_is_told_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thing that is written; a supervisor can then wait for room."""
    monkeypatch.setattr(atomic, "write_json", refuse)
    config = make_config(tmp_path / "run")
    with pytest.raises(NoRoomError, match=r"no room in .*: free some space and run") as told:
        ModelDistiller(config, progress=False).run_distillation()
    assert find_exit_code(told.value, has_supervisor=True) == EXIT_NO_ROOM
    assert find_exit_code(told.value, has_supervisor=False) == EXIT_ERROR


def test_for_want_of_room_a_run_has_not_failed_while_a_supervisor_may_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cvm_translator.pipeline.distiller.build_corpus", refuse)
    read, write = os.pipe()
    with pytest.raises(NoRoomError):
        ModelDistiller(make_config(tmp_path), progress=False, heartbeat=Heartbeat(write)).run_distillation()
    supervised = [event["kind"] for event in read_events(tmp_path / "logs" / "events.jsonl")]
    assert supervised == ["run_started", "warning"]
    os.close(read)
    os.close(write)
    with pytest.raises(NoRoomError):
        ModelDistiller(make_config(tmp_path), progress=False).run_distillation()
    alone = [event["kind"] for event in read_events(tmp_path / "logs" / "events.jsonl")]
    assert alone == [*supervised, "run_started", "failed"]
