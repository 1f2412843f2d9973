"""The arithmetic of a step against what PyTorch counts while a real model runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cvm_translator.config.schema import ModelConfig
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.losses import DistillationLoss
from cvm_translator.models.flops import TokenCounts, count_forward_flops
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.training.objectives import DistillationObjective
from cvm_translator.training.utilisation import StepCost, measure_peak

VOCABULARY = 300
SIZES = ModelConfig(dim=64, num_heads=4, feed_forward_dim=256, encoder_layers=3, decoder_layers=2, dropout=0.0)
TEACHER_SIZES = ModelConfig(dim=96, num_heads=4, feed_forward_dim=128, encoder_layers=2, decoder_layers=3, dropout=0.0)

BFLOAT16 = torch.autocast("cpu", torch.bfloat16)
"""In which attention is matrix products that PyTorch counts, and no kernel of its own that it does not."""


@pytest.fixture
def dataset() -> DistillationDataset:
    """Sentences of equal length, so that nothing is padded."""
    generator = np.random.default_rng(0)
    sources, targets = (generator.integers(4, VOCABULARY, (8, length)).tolist() for length in (11, 7))
    return DistillationDataset(sources, targets)


def test_a_forward_pass(dataset: DistillationDataset) -> None:
    model, batch = CvmTransformer(SIZES, VOCABULARY).eval(), dataset.batch(range(8))
    with FlopCounterMode(display=False) as counter, torch.no_grad(), BFLOAT16:
        hidden, matrix = model(batch.src, batch.src_mask, batch.tgt_in)
        hidden @ matrix.T
    ours = count_forward_flops(SIZES, VOCABULARY, TokenCounts(8, batch.num_source_tokens, batch.num_tokens))
    # PyTorch counts causal attention as if each token saw all the others
    assert 0.97 * counter.get_total_flops() < ours <= counter.get_total_flops()


@pytest.mark.parametrize("has_teacher", [False, True])
def test_a_step(dataset: DistillationDataset, has_teacher: bool) -> None:
    student = CvmTransformer(SIZES, VOCABULARY)
    teacher = CvmTransformer(TEACHER_SIZES, VOCABULARY) if has_teacher else None
    loss = DistillationLoss(2.0, 0.5 if has_teacher else 0.0, 0.5)
    objective, batch = DistillationObjective(student, loss, teacher), dataset.batch(range(8))
    with FlopCounterMode(display=False) as counter:
        with BFLOAT16:
            total = objective(batch, batch.num_tokens).total
        total.backward()
    counted = StepCost(student, teacher, has_stored_states=False, peak=1.0).count(batch)
    assert 0.97 * counter.get_total_flops() < counted < 1.01 * counter.get_total_flops()


def test_stored_states_leave_the_teacher_its_output_matrix(dataset: DistillationDataset) -> None:
    student, teacher = CvmTransformer(SIZES, VOCABULARY), CvmTransformer(TEACHER_SIZES, VOCABULARY)
    batch = dataset.batch(range(8))
    alone, stored, online = (
        StepCost(student, *parts, peak=1.0).count(batch) for parts in ((None, False), (teacher, True), (teacher, False))
    )
    assert stored - alone == pytest.approx(2.0 * 96 * VOCABULARY * batch.num_tokens)
    assert online > stored


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_peak_is_measured(precision: str) -> None:
    assert 1e8 < measure_peak(precision, torch.device("cpu")) < 1e15


def test_batches_count_their_source(dataset: DistillationDataset) -> None:
    batch = dataset.batch(range(8))
    assert batch.num_source_tokens == int(batch.src_mask.sum()) == 8 * 12
    assert [part.num_source_tokens for part in batch.split(3)] == [36, 24, 36]
