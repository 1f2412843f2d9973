"""Settings that change what a step is, from the config to a delivered student."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cvm_translator.corpus.batches import BatchSchedule
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.errors import ConfigError
from cvm_translator.models.folder import load_model
from cvm_translator.pipeline.parts import cut_for_memory
from cvm_translator.runs.events import read_events
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.micro_batches import write_factor

pytestmark = pytest.mark.slow


def test_slots_token_batches_and_another_divergence(numbers: Any, tmp_path: Path) -> None:
    config = numbers.write_config(
        "choices",
        teacher={"cache_dir": str(numbers.teachers)},
        student={"model": {"core_capacity": 6}},
        distillation={"num_iterations": 60, "batch_tokens": 500, "divergence": "js", "grad_accum_steps": 3},
        validation={"every_steps": 30},
        guard={"quality_threshold": 0.01},
    )
    end = numbers.start_run(config, tmp_path / "run").finish()
    assert (end.exit_code, end.error_lines) == (0, [])
    steps = [event for event in read_events(tmp_path / "run/logs/events.jsonl") if event["kind"] == "train"]
    losses = [event["loss"] for event in steps if event["stage"] == "distil"]
    assert len(losses) == 60 and sum(losses[-10:]) < 0.7 * sum(losses[:10])
    sizes = [event["num_tokens"] for event in steps if event["stage"] == "distil"]
    assert max(sizes) <= 500 and min(sizes) < max(sizes)
    assert "padded tokens" in (tmp_path / "run/logs/train.log").read_text()
    assert load_model(tmp_path / "run/student/int8").model.config.core_capacity == 6
    card = (tmp_path / "run/student/README.md").read_text()
    assert "divergence js" in card and "at most 6 slots" in card
    report = json.loads((tmp_path / "run/reports/final_report.json").read_text())
    assert report["test"]["int8"]["scores"]["chrf"]["value"] > 10


def test_memory_that_is_too_small_for_one_sentence_is_told(tmp_path: Path) -> None:
    """A token budget hides from the supervisor how many sentences there are; the trainer sees it."""
    from types import SimpleNamespace

    from cvm_translator.config.schema import TrainingConfig

    settings = TrainingConfig(batch_tokens=24, num_iterations=10, warmup_steps=1)
    batches = BatchSchedule(DistillationDataset([[5] * 5] * 20, [[5] * 5] * 20).lengths, 1, 0, batch_tokens=24)
    assert batches.largest_batch == 4
    context: Any = SimpleNamespace(layout=RunLayout(tmp_path))
    for factor in (1, 2, 4):
        write_factor(context.layout.micro_batches, "distil", factor)
        assert cut_for_memory(context, "distil", settings, batches).grad_accum_steps == factor
    write_factor(context.layout.micro_batches, "distil", 8)  # after a death with four
    with pytest.raises(ConfigError, match="out of memory with one sentence a micro-batch: make the model smaller"):
        cut_for_memory(context, "distil", settings, batches)
