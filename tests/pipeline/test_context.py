"""Completion records: what makes a rerun skip a stage, and what counts for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from cvm_translator.pipeline.context import StageRecord
from cvm_translator.runs.layout import RunLayout


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
