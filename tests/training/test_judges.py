"""What the judge measures beside the translations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.models.perplexity import compute_perplexity, measure_reference_losses
from cvm_translator.models.transformer import CvmTransformer


def test_perplexity_is_that_of_the_pairs_one_by_one(
    make_model: Callable[..., CvmTransformer], dataset: DistillationDataset
) -> None:
    model = make_model().eval()
    total, count = 0.0, 0
    for index in range(len(dataset)):
        batch: Any = dataset.batch([index])
        with torch.no_grad():
            hidden, matrix = model(batch.src, batch.src_mask, batch.tgt_in)
        log_probs = (hidden[0] @ matrix.T).log_softmax(-1)  # (T, V)
        total -= log_probs.gather(1, batch.tgt_out[0][:, None]).sum().item()
        count += batch.tgt_out.shape[1]
    expected = torch.tensor(total / count).exp().item()
    losses = measure_reference_losses(model, dataset, len(dataset), batch_size=7)
    assert compute_perplexity(losses) == pytest.approx(expected, rel=1e-4)


def test_logits_are_made_block_by_block(
    make_model: Callable[..., CvmTransformer], dataset: DistillationDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model().eval()
    expected = measure_reference_losses(model, dataset, len(dataset), batch_size=7)
    monkeypatch.setattr("cvm_translator.models.perplexity._BLOCK_ELEMENTS", 1)
    assert measure_reference_losses(model, dataset, len(dataset), batch_size=7) == pytest.approx(expected, rel=1e-5)


def test_each_pair_has_its_row_and_a_long_one_none(make_model: Callable[..., CvmTransformer]) -> None:
    pairs = [[4, 5, 6], [7] * 30, [4]]
    losses = measure_reference_losses(make_model().eval(), DistillationDataset(pairs, pairs, max_length=16), 3, 2)
    assert losses[:, 1].tolist() == [4, 0, 2]
    assert (losses[:, 0] > 0).tolist() == [True, False, True]


def test_where_no_pair_fits_there_is_no_number(make_model: Callable[..., CvmTransformer]) -> None:
    empty = DistillationDataset([[4] * 30], [[5] * 30], max_length=16)
    assert compute_perplexity(measure_reference_losses(make_model().eval(), empty, 1, batch_size=7)) is None
