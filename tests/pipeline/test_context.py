"""What stages share: completion records (what makes a rerun skip a stage), and signs of life at which one may leave."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cvm_translator.corpus.records import Pair
from cvm_translator.errors import Stopped
from cvm_translator.pipeline.context import RunContext, StageRecord
from cvm_translator.pipeline.parts import build_judge, build_scoring
from cvm_translator.runs.heartbeat import Heartbeat
from cvm_translator.runs.layout import RunLayout
from cvm_translator.training.signals import StopRequest


@pytest.fixture
def record(tmp_path: Path) -> StageRecord:
    output = tmp_path / "student" / "model"
    output.parent.mkdir()
    output.write_bytes(b"weights")
    record = StageRecord(RunLayout(tmp_path), "quantise", {"weights": 1})
    record.save({"answer": 42}, [output])
    return record


def test_a_complete_stage_gives_its_result(record: StageRecord) -> None:
    assert record.load() == {"answer": 42}


def test_other_inputs_or_outputs_count_for_nothing(record: StageRecord, tmp_path: Path) -> None:
    assert StageRecord(RunLayout(tmp_path), "quantise", {"weights": 2}).load() is None
    assert StageRecord(RunLayout(tmp_path), "gate", {"weights": 1}).load() is None
    (tmp_path / "student" / "model").write_bytes(b"Weights")
    assert record.load() is None


@pytest.mark.parametrize("text", ["", '{"inputs": "a', "[]", "{}", '{"inputs": 1, "outputs": 2, "result": 3}'])
def test_a_damaged_record_counts_for_nothing(record: StageRecord, tmp_path: Path, text: str) -> None:
    (tmp_path / "stages" / "quantise.json").write_text(text)
    assert record.load() is None


def test_a_stop_ends_a_validation_at_its_next_sign_of_life() -> None:
    """Each decoded batch gives one: to the supervisor, and to leave for whoever asked."""
    read, write = os.pipe()
    context: Any = SimpleNamespace(events=None, heartbeat=Heartbeat(write), stop=StopRequest())
    context.device, context.config = torch.device("cpu"), SimpleNamespace(score_beside_training="auto")
    context.beat = lambda phase: RunContext.beat(context, phase)
    context.go_on = lambda phase: RunContext.go_on(context, phase)
    tokenizer: Any = SimpleNamespace(encode=lambda texts: [[4] for _ in texts])
    corpus: Any = SimpleNamespace(validation=[Pair("a", "b", "")])
    model: Any = SimpleNamespace(max_length=8)
    unused: Any = None
    judge = build_judge(context, "distil", unused, corpus, tokenizer, model, unused)
    assert judge.beat is not None
    judge.beat()
    assert os.read(read, 100).startswith(b"validation ")
    judge.on_wait()
    context.stop.request()
    with pytest.raises(Stopped):
        judge.beat()
    with pytest.raises(Stopped):
        judge.on_wait()
    os.close(read)
    os.close(write)


@pytest.mark.parametrize(
    ("device", "wanted", "num_cores", "num_scoring"),
    [
        ("cpu", "auto", 16, None),  # cores that num_threads leaves free are left to others, unless asked for
        ("cpu", True, 16, 13),
        ("cpu", True, 2, 1),
        ("cuda", "auto", 2, None),
        ("cuda", "auto", 3, 2),
        ("cuda", False, 16, None),
        ("cuda", True, 2, 1),
    ],
)
def test_scores_are_computed_beside_training_where_cores_are_free(
    device: str, wanted: Any, num_cores: int, num_scoring: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training keeps three threads busy on the CPU, and one core for a GPU."""
    monkeypatch.setattr("loky.cpu_count", lambda: num_cores)
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    notes: list[str] = []
    context: Any = SimpleNamespace(device=torch.device(device), note=notes.append)
    context.config = SimpleNamespace(score_beside_training=wanted)
    validator: Any = SimpleNamespace(config=None, sources=["a"], references=["b"])
    scoring = build_scoring(context, validator)
    assert (scoring is None) == (num_scoring is None)
    told = [f"scores are computed beside training, by a process of its own (threads: {num_scoring})"]
    assert notes == ([] if num_scoring is None else told)
