"""Calibration data: the same real tokens for every model."""

from __future__ import annotations

import pytest
import torch

from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.models.calibration import build_calibration
from cvm_translator.quantization import AdvancedQuantizer, MemoryOptimizedQuantizer, find_plan, name_plan

PAIRS = [[4 + (i * 7 + j) % 10 for j in range(1 + i % 6)] for i in range(12)]


@pytest.fixture
def dataset() -> DistillationDataset:
    return DistillationDataset(PAIRS, [pair[::-1] for pair in PAIRS], 24)


def test_logits_are_those_of_each_pair_alone(make_model, dataset):
    model = make_model()
    logits = build_calibration(dataset, num_sentences=12, batch_size=5)(model)
    assert logits.shape == (sum(len(pair) + 1 for pair in PAIRS), 14)
    expected = torch.cat([build_calibration(DistillationDataset([p], [p[::-1]]))(model) for p in PAIRS])
    distance = (logits[:, None] - expected[None]).abs().amax(-1)  # the order is another
    assert distance.amin(0).max() < 1e-4 and distance.amin(1).max() < 1e-4
    assert not logits.requires_grad


def test_every_call_sees_the_same_tokens_and_the_run_sees_no_random_numbers_gone(make_model, dataset):
    model, before = make_model(), torch.get_rng_state()
    calibrate = build_calibration(dataset, num_sentences=7, batch_size=3)
    assert torch.equal(calibrate(model), calibrate(model))
    assert torch.equal(calibrate(model), build_calibration(dataset, num_sentences=7, batch_size=3)(model))
    assert len(calibrate(model)) < len(build_calibration(dataset)(model))
    assert torch.equal(torch.get_rng_state(), before)


def test_it_serves_static_and_memory_optimised_quantisation(make_model, dataset):
    model, calibrate = make_model(), build_calibration(dataset)
    static = AdvancedQuantizer("static").convert(model, calibrate)
    assert name_plan(find_plan(static)) == "int8_static"
    reference = calibrate(model)
    assert (calibrate(static) - reference).norm() < 0.1 * reference.norm()
    result = MemoryOptimizedQuantizer(3.0).plan(model, calibrate)
    assert result["target_met"]
    assert set(result["plan"]) == set(find_plan(model))


def test_no_pairs(dataset):
    with pytest.raises(ValueError, match="calibration needs sentence pairs"):
        build_calibration(DistillationDataset([], []))
