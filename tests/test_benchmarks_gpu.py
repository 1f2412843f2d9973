"""The benchmark of training on a GPU, tried on a CPU."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.common import BenchmarkError
from benchmarks.machine import read_machine
from benchmarks.training_problem import Problem

PROBLEM = Problem("tiny", "tiny", 100, 8, num_steps=3, num_warm_up=2)
FIGURES = {"tokens_per_second": 100.0, "padding_efficiency": 0.97, "utilisation": 0.2, "memory_mib": 900.0}


def test_a_worker_trains_with_the_teachers_stored_states() -> None:
    figures = gpu.run_worker(gpu.OURS_STORED, PROBLEM, torch.device("cpu"))
    assert figures["tokens_per_second"] > 0 and figures["utilisation"] > 0 and "states_seconds" in figures
    assert "memory_mib" not in figures  # PyTorch counts a GPU's only


def test_a_compiled_student_is_the_one_that_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[dict[str, Any]] = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: compiled.append(options))
    gpu.run_worker(gpu.OURS + gpu.COMPILED, PROBLEM, torch.device("cpu"))
    assert compiled == [{"dynamic": True}]
    gpu.run_worker(gpu.OURS, PROBLEM, torch.device("cpu"))
    assert len(compiled) == 1


def test_what_is_claimed_of_the_gpu_can_fail() -> None:
    systems = dict.fromkeys(gpu.SYSTEMS, FIGURES)
    assert any(gpu.check(systems).values())
    assert any(gpu.check(systems | {gpu.OURS: FIGURES | {"utilisation": 0.5}}).values())  # without stored states
    systems[gpu.OURS_STORED + gpu.COMPILED] = FIGURES | {"utilisation": 0.36}
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
