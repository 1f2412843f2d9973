"""Choosing by logits that are rounded to bfloat16: what is chosen is what is best, not what rounds to the most."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cvm_translator.config.schema import ModelConfig
from cvm_translator.models import packing
from cvm_translator.models.decoding import translate_ids
from cvm_translator.models.initialization import init_random
from cvm_translator.models.screening import choose_among_rounded
from cvm_translator.models.transformer import EOS_ID, CvmTransformer

FORBIDDEN = [0, 1, 3]
ROUNDING = 1e-4
"""Of a float32 logit, whose sums may be taken in any order."""


def compute_logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """In float64."""
    logits = hidden.double() @ weight.double().T
    logits[:, FORBIDDEN] = -math.inf
    return logits


def find_longest(weight: Tensor) -> float:
    return float(weight.float().norm(dim=1).amax())


def count_worse(chosen: Tensor, exact: Tensor) -> int:
    """How many choices are not the best one."""
    return int((exact.gather(1, chosen[:, None])[:, 0] < exact.amax(1) - ROUNDING).sum())


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_exactly_best_token_is_chosen(sign: float) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(3000, 64, generator=generator).bfloat16()
    weight[1000:2000] = weight[:1000]  # twins, but for one element
    weight[1000:2000, 0] += 0.01
    hidden = weight[:400].float() + 0.5 * torch.randn(400, 64, generator=generator)
    if sign < 0:  # only tokens with negative logits are left
        weight = -weight.abs()
        hidden = hidden.abs()
    rounded = hidden.bfloat16() @ weight.T
    rounded[:, FORBIDDEN] = -math.inf
    exact = compute_logits(hidden, weight)
    assert bool((exact.amax(1) * sign > 0).all())
    assert count_worse(choose_among_rounded(rounded, hidden, weight, find_longest(weight)), exact) == 0
    assert count_worse(rounded.float().argmax(1), exact) > 20


def test_logits_that_are_not_finite_choose_something() -> None:
    logits = torch.zeros(4, 10, dtype=torch.bfloat16)
    logits[0, 4], logits[1, 5], logits[3] = math.nan, math.inf, -math.inf
    chosen = choose_among_rounded(logits, torch.zeros(4, 64), torch.zeros(10, 64, dtype=torch.bfloat16), 0.0)
    assert chosen.tolist() == [4, 5, 0, 0]


def test_a_forbidden_token_is_not_chosen_whatever_the_bounds() -> None:
    logits = torch.zeros(1, 10, dtype=torch.bfloat16)
    logits[0, FORBIDDEN] = -math.inf
    hidden = torch.full((1, 64), 3e38)  # its norm is infinite, and so are the bounds
    weight = torch.zeros(10, 64, dtype=torch.bfloat16)
    weight[FORBIDDEN] = 1.0
    assert int(choose_among_rounded(logits, hidden, weight, find_longest(weight))) not in FORBIDDEN


@pytest.mark.skipif(not packing._has_products(torch.bfloat16), reason="no packed products in bfloat16 here")
def test_a_model_in_bfloat16_chooses_what_is_best(monkeypatch: pytest.MonkeyPatch) -> None:
    model = CvmTransformer(ModelConfig(dim=64, num_heads=4, feed_forward_dim=128, decoder_layers=2), 500)
    init_random(model, 3)
    with torch.no_grad():
        model.embedding.weight[EOS_ID].zero_()  # or it would end at once
        model.embedding.weight[300:] = model.embedding.weight[100:300] * 1.01  # near equals
        model.embedding.weight.mul_(20)  # so that they differ by more than sums in another order do
    model.embedding.to(torch.bfloat16)
    num_worse: list[tuple[int, int]] = []

    def choose(rounded: Tensor, hidden: Tensor, weight: Tensor, longest: float) -> Tensor:
        chosen = choose_among_rounded(rounded, hidden, weight, longest)
        exact = compute_logits(hidden, weight)
        num_worse.append((count_worse(chosen, exact), count_worse(rounded.float().argmax(1), exact)))
        return chosen

    monkeypatch.setattr(packing, "choose_among_rounded", choose)
    sources = [[i, i + 1, i + 2] for i in range(5, 45)]
    translate_ids(model, sources, batch_size=20)
    ours, by_rounding = (sum(counts) for counts in zip(*num_worse, strict=True))
    assert ours == 0 < by_rounding
