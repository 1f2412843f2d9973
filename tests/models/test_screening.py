"""Screening an output matrix: the best token is always among the candidates, and is the one that is chosen."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cvm_translator.config.schema import ModelConfig
from cvm_translator.models import packing, screening
from cvm_translator.models.decoding import translate_ids
from cvm_translator.models.initialization import init_random
from cvm_translator.models.packing import PackedEmbedding
from cvm_translator.models.screening import OutputScreen, can_screen
from cvm_translator.models.transformer import EOS_ID, CvmTransformer
from cvm_translator.quantization.kernels import has_four_bit_kernel

pytestmark = pytest.mark.skipif(not has_four_bit_kernel("cpu"), reason="this PyTorch has no 4-bit kernel for CPUs")
FORBIDDEN = [0, 1, 3]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def make_matrix(dtype: torch.dtype) -> Tensor:
    """Rows of very different lengths, with outliers."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(1000, 64, generator=generator) * torch.logspace(-2, 1, 1000)[:, None]
    weight[::7, 5] *= 40
    weight[11] = 0
    return weight.to(dtype)


def make_hidden(dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(400, 64, generator=generator)
    hidden[100:200] *= torch.logspace(-6, 4, 100)[:, None]
    hidden[200:300, 5] *= 100
    return hidden.to(dtype)


@DTYPES
def test_every_logit_lies_within_its_bound(dtype: torch.dtype) -> None:
    weight, hidden = make_matrix(dtype), make_hidden(dtype)
    lowest, highest = OutputScreen(weight).bound_logits(hidden)
    true = hidden.double() @ weight.double().T
    assert bool((lowest <= true).all()) and bool((true <= highest).all())
    assert (highest - lowest)[0].mean() < true[0].std()  # or it would say nothing


@DTYPES
def test_the_best_token_that_is_not_forbidden_is_chosen(dtype: torch.dtype) -> None:
    weight, hidden = make_matrix(dtype), make_hidden(dtype)
    weight[FORBIDDEN] *= 1000  # they would win otherwise
    screen = OutputScreen(weight)
    logits = hidden.double() @ weight.double().T
    logits[:, FORBIDDEN] = -math.inf
    chosen = [screen.choose(rows, FORBIDDEN) for rows in hidden.split(4)]
    assert [token for tokens in chosen for token in tokens] == logits.argmax(1).tolist()


def test_few_tokens_are_candidates() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4000, 64, generator=generator)
    hidden = weight[::40] + 0.3 * torch.randn(100, 64, generator=generator)  # each is one row's, more or less
    numbers = OutputScreen(weight).find_candidates(hidden, FORBIDDEN).sum(1).double()
    assert numbers.min() >= 1 and numbers.median() <= 3 and numbers.max() < 100


def test_none_where_all_or_no_tokens_are_candidates() -> None:
    screen = OutputScreen(torch.randn(screening.MAX_CANDIDATES + 100, 64))
    hidden = torch.zeros(4, 64)
    hidden[1, 0], hidden[2, 0], hidden[3, 0] = math.nan, math.inf, 3.0
    screened = screen.choose(hidden, FORBIDDEN)
    assert screened[:3] == [None] * 3 and screened[3] is not None


def test_what_can_be_screened(monkeypatch: pytest.MonkeyPatch) -> None:
    assert can_screen(torch.empty(32_000, 512)) and can_screen(torch.empty(32_000, 512, dtype=torch.bfloat16))
    assert not can_screen(torch.empty(8000, 512))  # too small to gain
    assert not can_screen(torch.empty(32_000, 500))  # no whole groups
    assert not can_screen(torch.empty(32_000, 512, dtype=torch.float64))
    monkeypatch.setattr(screening, "has_four_bit_kernel", lambda device_type: False)
    assert not can_screen(torch.empty(32_000, 512))


@pytest.mark.parametrize("batch_size", [1, 4, 8])
def test_translations_are_the_same_with_a_screen(batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = CvmTransformer(ModelConfig(dim=64, num_heads=4, feed_forward_dim=128, decoder_layers=2), 500)
    init_random(model, 3)
    with torch.no_grad():
        model.embedding.weight[EOS_ID].zero_()  # or it would end at once
    sources = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14, 15, 16, 17], [18], [19, 20]]
    expected = translate_ids(model, sources, batch_size=batch_size)
    made: list[int] = []

    class Counting(OutputScreen):
        def choose(self, hidden: Tensor, forbidden: list[int]) -> list[int | None]:
            made.append(len(hidden))
            return super().choose(hidden, forbidden)

    monkeypatch.setattr(packing, "_LEAST_ELEMENTS", {torch.float32: 0})
    monkeypatch.setattr(packing, "_SCREEN_AFTER", 2)
    monkeypatch.setattr(packing, "OutputScreen", Counting)
    monkeypatch.setattr(screening, "MIN_ELEMENTS", 0)
    assert translate_ids(model, sources, batch_size=batch_size) == expected
    assert made and max(made) <= screening.MAX_ROWS
    assert not isinstance(model.embedding, PackedEmbedding)
