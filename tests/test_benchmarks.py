"""Quick instances of the benchmarks that need no run: their systems compute what they are said to."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import loss, scaling, step_profile, teacher_cache, training, validation
from cvm_translator.corpus.records import Pair
from cvm_translator.validation.preflight import check_alignment

PROBLEM = loss.Problem(tokens=40, vocabulary=60, student_dim=16, teacher_dim=24)


def test_the_naive_loss_is_ours_in_float64() -> None:
    inputs = loss.Inputs.draw(PROBLEM).head(PROBLEM.tokens, torch.float64)
    twin = inputs.head(PROBLEM.tokens, torch.float64)
    ours, naive = loss.compute_ours(inputs), loss.compute_naive(twin)
    torch.testing.assert_close(ours, naive)
    torch.autograd.backward([ours, naive])
    torch.testing.assert_close(inputs.hidden.grad, twin.hidden.grad)
    torch.testing.assert_close(inputs.matrix.grad, twin.matrix.grad)


def test_the_claims_about_the_loss_can_fail() -> None:
    good = {"peak_mib": 1.0, "seconds": 1.0, "error": 0.001}
    bad = {"peak_mib": 1.5, "seconds": 0.5, "error": 0.5}
    systems = {loss.OURS: good, loss.NAIVE: bad, "liger 64": bad}
    found = loss.check(systems)
    assert all(found.values()) and len(found) == 5
    far = {"peak_mib": 20.0, "seconds": 2.0, "error": 0.001}
    assert not any(loss.check({loss.OURS: good, loss.NAIVE: far, "liger 64": far}).values())
    assert len(loss.check({loss.OURS: good})) == 1  # what was not run is not claimed


@pytest.mark.parametrize("teacher", [None, "tiny"])
def test_our_side_of_the_training_benchmark(teacher: str | None, tmp_path: Path) -> None:
    parts = training.Parts.build(training.Problem("tiny", teacher, 100, 8, num_steps=3, num_warm_up=2))
    figures = training.run_ours(parts, tmp_path, has_stored_states=teacher is not None)
    assert figures["tokens_per_second"] > 0 and 0 < figures["utilisation"] < 2
    assert ("states_seconds" in figures) == (teacher is not None)


def test_the_stopwatch_leaves_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 101.0, 103.0, 105.0])
    monkeypatch.setattr(training.time, "perf_counter", lambda: next(times))
    watch = training.Stopwatch(num_warm_up=2)
    for num_tokens in (50, 60, 100, 180):
        watch.mark(num_tokens)
    assert watch.rate() == pytest.approx((180 - 60) / (105.0 - 101.0))


def test_stored_states_change_no_loss_beyond_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = training.Problem("tiny", "tiny", 100, 8, num_steps=4, num_warm_up=1)
    monkeypatch.setattr(
        teacher_cache.common, "ask_worker", lambda name, *_: json.dumps(teacher_cache.run_worker(name, problem))
    )
    data = teacher_cache.measure(problem, num_threads=1, num_rounds=1)
    data |= {"problem": asdict(problem), "threads": 1, "rounds": 1}
    assert 0 <= data["largest_loss_difference"] <= teacher_cache.MAX_LOSS_DIFFERENCE
    assert data["speedup"] == data["tokens_per_second"][training.OURS_STORED] / data["tokens_per_second"][training.OURS]
    slow = teacher_cache.check(data | {"speedup": 1.2, "largest_loss_difference": 0.1})
    assert [len(found) for found in slow.values()] == [1, 1]
    assert "1.20 times" in teacher_cache.format_results(data | {"failures": slow})


def test_sentences_of_a_size_are_new_and_belong_together(tmp_path: Path) -> None:
    words = [f"{chr(97 + a)}{chr(97 + b)}{chr(97 + c)}" for a in range(12) for b in range(12) for c in range(12)]
    (tmp_path / "train.tsv").write_text("".join(f"{word}\t{word}x\tfile:1\n" for word in words))
    scaling.write_corpus(tmp_path / "train.tsv", tmp_path / "made.tsv", 2000)
    pairs = [line.split("\t") for line in (tmp_path / "made.tsv").read_text().splitlines()]
    assert len(pairs) == len({tuple(pair) for pair in pairs}) == 2000
    assert all(len(source.split()) == len(target.split()) for source, target in pairs)
    check_alignment([Pair(source, target, "made.tsv") for source, target in pairs])


def test_growth_that_is_too_much_is_told() -> None:
    figures = {"start_seconds": 5.0, "step_ms": 10.0}
    good = scaling.check({10: figures, 100: figures | {"step_ms": 10.5}})
    assert not any(good.values())
    bad = scaling.check({10: figures, 100: {"start_seconds": 40.0, "step_ms": 20.0}})
    assert list(bad.values()) == [["100 pairs: 40 s"], ["2.00 times"]]


def make_events(seconds: float) -> list[dict[str, Any]]:
    """Of a stage of 100 steps that tells of each, takes `seconds` a step and validates twice."""
    progress = [
        {
            "kind": "progress",
            "stage": "distil",
            "step": step,
            "steps_per_second": 1 / seconds,
            "memory_mib": 100.0 + step,
        }
        for step in range(1, 101)
    ]
    validations = [{"kind": "validation", "stage": "distil", "step": step, "seconds": 5.0} for step in (50, 100)]
    saves = [{"kind": "checkpoint", "stage": "distil", "step": step, "seconds": 0.1} for step in (50, 100)]
    return [*progress, *validations, *saves]


def test_what_a_run_spent_is_read_from_its_events() -> None:
    stage = validation.measure_stage(make_events(0.5), "distil", {"corpus": 100.0, "distil": 100.0}, last_step=80)
    assert stage["validation_share_of_stage"] == 0.1 and stage["validation_share_of_run"] == 0.05
    assert stage["checkpoint_share_of_stage"] == pytest.approx(0.002)
    assert stage["steps_per_second"] == [2.0, 2.0] and stage["memory_mib"] == [115.5, 195.5]
    failures = validation.check({"distil": stage}, 0.05)
    assert [bool(found) for found in failures.values()] == [False, False, False, True]
    with pytest.raises(validation.BenchmarkError, match="told its progress only 0 times"):
        validation.measure_stage([], "distil", {"distil": 1.0}, last_step=1)


@pytest.mark.parametrize(
    ("operation", "group"),
    [
        ("aten::addmm", step_profile.MATRIX_PRODUCTS),
        ("mkldnn::_linear_pointwise", step_profile.MATRIX_PRODUCTS),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::_log_softmax_backward_data", "softmax"),
        ("aten::native_layer_norm_backward", "layer norm"),
        ("aten::copy_", "copies and casts"),
        ("aten::_to_copy", "copies and casts"),
        ("aten::scatter_", "gather and scatter"),
        ("aten::embedding_dense_backward", "gather and scatter"),
        ("aten::masked_fill_", step_profile.OTHER),
        ("aten::add_", step_profile.OTHER),
    ],
)
def test_operations_of_a_step_are_grouped_by_what_they_do(operation: str, group: str) -> None:
    assert step_profile.find_group(operation) == group
