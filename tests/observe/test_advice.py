"""Advice speaks where its figure calls for it, and only there."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cvm_translator.observe.advice import AdviceFacts, advise

HEALTHY = AdviceFacts(
    temperature=2.0,
    losses=[5.0, 3.0, 2.5, 2.2, 2.0, 1.9, 1.85, 1.8, 1.78, 1.77],
    qualities=[0.5, 0.8, 0.9, 0.93, 0.94, 0.945],
    retention=0.95,
    teacher_bleu=30.0,
    compression=2.5,
    quantisation_gap=0.005,
    quantisation_start=0.66,
    skipped_share=0.0,
    gradient_ratio=0.8,
)


def test_a_healthy_run_and_an_unmeasured_one_get_none() -> None:
    assert advise(HEALTHY) == []
    assert advise(AdviceFacts()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"losses": [5.0, 5.0, 4.99, 5.01, 5.0, 4.98]}, ["does not converge", "distillation.temperature", "now 2"]),
        ({"losses": [5.0] * 6, "temperature": 1.0}, ["does not converge", "distillation.learning_rate"]),
        ({"gradient_ratio": 0.07, "temperature": 6.0}, ["0.07", "distillation.temperature"]),
        ({"qualities": [0.5, 0.8, 0.94, 0.93, 0.9, 0.88]}, ["overfits", "6.4 %"]),
        ({"qualities": [0.3, 0.5, 0.7, 0.9], "retention": 0.9}, ["still rose", "num_iterations"]),
        ({"retention": 1.04}, ["teacher is the bottleneck", "104.0 %"]),
        ({"teacher_bleu": 9.0}, ["9.0 BLEU", "bottleneck"]),
        ({"compression": 14.0}, ["14.0 times", "middle size"]),
        ({"quantisation_gap": 0.04}, ["4.0 points", "start_fraction, now 0.66"]),
        ({"quantisation_gap": 0.04, "quantisation_start": float("nan")}, ["quantization.method: qat"]),
        ({"skipped_share": 0.05}, ["5.0 % of the batches"]),
        ({"halted": True, "num_rollbacks": 3}, ["halted", "3 rollbacks"]),
    ],
)
def test_each_rule(change: dict[str, object], words: list[str]) -> None:
    (sentence,) = advise(replace(HEALTHY, **change))  # type: ignore[arg-type]
    for word in words:
        assert word in sentence
