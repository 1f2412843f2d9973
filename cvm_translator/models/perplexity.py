"""How well a model foretells the references: teacher-forced cross-entropy of each pair, and its perplexity."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.corpus.tokenizer import PAD_ID
from cvm_translator.models.transformer import CvmTransformer

FloatArray = NDArray[np.float64]

_BLOCK_ELEMENTS = 1 << 24
"""Logits at a time: 64 MiB in float32."""


@torch.inference_mode()
def measure_reference_losses(
    model: CvmTransformer, held_out: DistillationDataset, num_pairs: int, batch_size: int
) -> FloatArray:
    """(num_pairs, 2) nats and tokens of each pair's reference, eos included.

    `num_pairs` went into `held_out`; the rows of those that it has dropped as too long are zero.
    """
    found = np.zeros((num_pairs, 2))
    device = model.positions.device
    order = np.argsort(held_out.lengths[:, 1], kind="stable")
    for start in range(0, len(order), batch_size):
        batch = held_out.batch(order[start : start + batch_size]).to(device)
        hidden, matrix = model(batch.src, batch.src_mask, batch.tgt_in)
        is_real = batch.tgt_out != PAD_ID
        losses = torch.zeros(batch.tgt_out.shape, dtype=torch.float32, device=device)
        losses[is_real] = _cross_entropies(hidden[is_real].float(), matrix.float(), batch.tgt_out[is_real])
        rows = held_out.kept[batch.indices]
        found[rows, 0] = losses.double().sum(1).cpu().numpy()
        found[rows, 1] = is_real.sum(1).cpu().numpy()
    return found


def _cross_entropies(hidden: torch.Tensor, matrix: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(N,) of (N, D) states and a (V, D) output matrix, without the logits of all of them at once."""
    rows = max(1, _BLOCK_ELEMENTS // len(matrix))
    return torch.cat(
        [
            torch.nn.functional.cross_entropy(
                hidden[begin : begin + rows] @ matrix.T, targets[begin : begin + rows], reduction="none"
            )
            for begin in range(0, len(targets), rows)
        ]
    )


def compute_perplexity(losses: FloatArray) -> float | None:
    """exp of the mean nats a reference token, of (N, 2) sums; None where there are none."""
    nats, num_tokens = losses.sum(axis=0)
    return math.exp(min(nats / num_tokens, 700.0)) if num_tokens else None
