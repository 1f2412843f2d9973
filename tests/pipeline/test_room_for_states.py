"""The teacher's stored states are part of the room that is asked for before the first step."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cvm_translator.config import DistillationConfig
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.errors import RunFolderError
from cvm_translator.pipeline.student import check_room_for_stored, choose_stored
from cvm_translator.runs.layout import RunLayout
from cvm_translator.teachers.states import TeacherStates, TeacherTopTargets

DIM = 16


@pytest.fixture
def dataset() -> DistillationDataset:
    generator = np.random.default_rng(3)
    sources = [generator.integers(4, 24, 5).tolist() for _ in range(20)]
    return DistillationDataset(sources, sources)


@pytest.fixture
def teacher() -> Any:
    return SimpleNamespace(sha256="abc", model=SimpleNamespace(config=SimpleNamespace(dim=DIM), vocab_size=100))


def make_context(root: Path, notes: list[str], **teacher: Any) -> Any:
    model = {"dim": DIM, "num_heads": 2}
    config = DistillationConfig(
        distillation={"precision": "bfloat16"}, teacher={"model": model, **teacher}, student={"model": model}
    )
    layout = RunLayout(root)
    return SimpleNamespace(config=config, layout=layout, device=torch.device("cpu"), note=notes.append)


def test_states_that_are_not_there_yet_need_room(tmp_path: Path, dataset: DistillationDataset, teacher: Any) -> None:
    context = make_context(tmp_path, [])
    stored = choose_stored(context, teacher, dataset, num_epochs=10.0)
    assert isinstance(stored, TeacherStates)
    needed = 20 * 6 * DIM * 2
    assert check_room_for_stored(context, stored) == needed
    stored.file.path.parent.mkdir(parents=True)
    stored.file.path.write_bytes(b"\0" * needed)
    stored.file.path.with_name(stored.file.path.name + ".json").write_text("{}")
    assert check_room_for_stored(context, stored) == 0


def test_a_shared_cache_is_asked_for_its_own_room(
    tmp_path: Path, dataset: DistillationDataset, teacher: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_context(tmp_path / "run", [], cache_dir=tmp_path / "cache")
    stored = choose_stored(context, teacher, dataset, num_epochs=10.0)
    assert check_room_for_stored(context, stored) == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=999))
    with pytest.raises(RunFolderError, match="make room"):
        check_room_for_stored(context, stored)


def test_states_over_the_budget_need_none(tmp_path: Path, dataset: DistillationDataset, teacher: Any) -> None:
    notes: list[str] = []
    context = make_context(tmp_path, notes)
    teacher.model.config.dim = 2**29
    assert choose_stored(context, teacher, dataset, num_epochs=10.0) is None
    assert "over teacher.states_budget_mib" in notes[0]


def test_states_do_not_pay_for_one_epoch(tmp_path: Path, dataset: DistillationDataset, teacher: Any) -> None:
    assert choose_stored(make_context(tmp_path, []), teacher, dataset, num_epochs=1.0) is None
    assert check_room_for_stored(make_context(tmp_path, []), None) == 0


def test_top_targets_are_stored_where_they_are_asked_for(
    tmp_path: Path, dataset: DistillationDataset, teacher: Any
) -> None:
    stored = choose_stored(make_context(tmp_path, [], top_k=8, states_budget_mib=1), teacher, dataset, num_epochs=1.0)
    assert isinstance(stored, TeacherTopTargets) and stored.file.num_bytes == 20 * 6 * 8 * 4
