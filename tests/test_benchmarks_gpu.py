"""The benchmark of training on a GPU, tried on a CPU."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from benchmarks import gpu, training
from benchmarks.common import BenchmarkError
from benchmarks.machine import read_machine
from benchmarks.training_problem import Problem

PROBLEM = Problem("tiny", "tiny", 100, 8, num_steps=3, num_warm_up=2)
FIGURES = {"tokens_per_second": 100.0, "padding_efficiency": 0.97, "utilisation": 0.2, "memory_mib": 900.0}


def test_all_systems_train_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[bool, bool]] = []

    def run_ours(*arguments: Any, is_compiled: bool, **options: Any) -> dict[str, float]:
        calls.append((is_compiled, options["stored"] is not None))
        return training.run_ours(*arguments, **options)  # what compiling does is tried in tests/training

    monkeypatch.setattr(gpu, "run_ours", run_ours)
    systems = gpu.measure(PROBLEM, torch.device("cpu"), num_rounds=2)
    assert calls == 2 * [(True, False), (False, False), (True, True), (False, True)]
    for figures in systems.values():
        assert figures["tokens_per_second"] > 0 and figures["utilisation"] > 0
        assert "memory_mib" not in figures  # PyTorch counts a GPU's only


def test_what_is_claimed_of_the_gpu_can_fail() -> None:
    systems = dict.fromkeys(gpu.SYSTEMS, FIGURES)
    assert any(gpu.check(systems).values())
    assert any(gpu.check(systems | {gpu.OURS: FIGURES | {"utilisation": 0.5}}).values())  # without stored states
    systems[gpu.OURS_STORED] = FIGURES | {"utilisation": 0.36}
    data = {"machine": read_machine(), "device": "a GPU", "problem": vars(PROBLEM), "num_parameters": 100, "rounds": 5}
    data |= {"systems": systems, "failures": gpu.check(systems)}
    assert not any(data["failures"].values())
    text = gpu.format_results(data)
    assert "a GPU" in text and "| 36.0%       | 97.0%" in text


def test_without_a_gpu_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    with pytest.raises(BenchmarkError, match="no CUDA device: run it on one that has, or try the program with --devi"):
        gpu.main()
