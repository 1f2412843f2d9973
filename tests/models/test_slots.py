"""Count-Vector-Merge memory against a slot-by-slot reference, and teacher-forced against incremental decoding."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from cvm_translator.config.schema import ModelConfig
from cvm_translator.models.attention import attend, attend_to_slots
from cvm_translator.models.decoding import pad_sources, translate_ids
from cvm_translator.models.initialization import init_random
from cvm_translator.models.slots import SlotCache, merge_source
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.quantization import convert_with_plan, find_fake_plan

B, H, D = 3, 2, 8
VOCABULARY = 50


# ---------------------------------------------------------------------------------------------------------- reference


@dataclass
class Slot:
    count: int
    key: Tensor
    value: Tensor


def merge_cheapest(slots: list[Slot], num_candidates: int) -> None:
    """The two neighbours among the first slots whose merging costs least, the leftmost of equals, become one."""

    def cost(left: Slot, right: Slot) -> float:
        weight = left.count * right.count / (left.count + right.count)
        return weight * (left.key - right.key).square().sum().item()

    costs = [cost(*pair) for pair in itertools.pairwise(slots[:num_candidates])]
    at = costs.index(min(costs))
    left, right = slots[at], slots.pop(at + 1)
    total = left.count + right.count
    slots[at] = Slot(
        total,
        (left.count * left.key + right.count * right.key) / total,
        (left.count * left.value + right.count * right.value) / total,
    )


def attend_by_reference(q: Tensor, slots: list[Slot]) -> Tensor:
    """Attention of one query (d,) to slots, each counted as often as it has tokens."""
    logits = torch.stack([q @ slot.key / math.sqrt(len(q)) + math.log(slot.count) for slot in slots])
    weights = logits.softmax(0)
    return torch.stack([weight * slot.value for weight, slot in zip(weights, slots, strict=True)]).sum(0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------ self-attention


@pytest.mark.parametrize("capacity", [2, 3, 5, 11, 12])
def test_self_attention_is_the_reference(capacity: int) -> None:
    length = 12
    q, k, v = (draw(B, H, length, D, seed=seed) for seed in range(3))
    expected = torch.empty(B, H, length, D)
    for b in range(B):
        for h in range(H):
            slots: list[Slot] = []
            for t in range(length):
                slots.append(Slot(1, k[b, h, t], v[b, h, t]))
                if len(slots) > capacity:
                    merge_cheapest(slots, capacity)  # the newest one is exempt
                assert len(slots) <= capacity and sum(slot.count for slot in slots) == t + 1
                expected[b, h, t] = attend_by_reference(q[b, h, t], slots)
    torch.testing.assert_close(attend_to_slots(q, k, v, capacity), expected, rtol=1e-5, atol=1e-6)
    cache = SlotCache(B, H, D, k, capacity)
    for t in range(length):
        keys, values, bias = cache.append(k[:, :, t], v[:, :, t])
        assert keys.shape[2] == min(t + 1, capacity)
        step = attend(q[:, :, t : t + 1], keys, values, bias)
        torch.testing.assert_close(step[:, :, 0], expected[:, :, t], rtol=1e-5, atol=1e-6)


def test_equal_costs_merge_on_the_left_and_the_newest_token_never() -> None:
    cache = SlotCache(1, 1, D, draw(1, D), 3)
    for _ in range(3):
        cache.append(torch.ones(1, 1, D), torch.ones(1, 1, D))
    _, _, bias = cache.append(torch.ones(1, 1, D), torch.ones(1, 1, D))
    assert bias is not None
    assert bias.exp().flatten().tolist() == pytest.approx([2.0, 1.0, 1.0])
    far, near = 9.0 * torch.ones(1, 1, D), torch.zeros(1, 1, D)
    cache = SlotCache(1, 1, D, draw(1, D), 2)
    for keys in (far, near, near):
        _, _, bias = cache.append(keys, keys)
    assert bias is not None
    assert bias.exp().flatten().tolist() == pytest.approx([2.0, 1.0])  # far and near, not near and the newest near


def test_no_gradient_goes_through_the_choice_but_through_the_means() -> None:
    q, k, v = (draw(1, 1, 6, D, seed=seed).double().requires_grad_() for seed in range(3))
    assert torch.autograd.gradcheck(lambda *qkv: attend_to_slots(*qkv, 3), (q, k, v))


# ----------------------------------------------------------------------------------------------------- cross-attention


@pytest.mark.parametrize("capacity", [2, 4, 9])
def test_cross_attention_is_the_reference(capacity: int) -> None:
    lengths, longest = [10, 3, 7], 10
    q, k, v = draw(B, H, 4, D), draw(B, H, longest, D, seed=1), draw(B, H, longest, D, seed=2)
    mask = (torch.arange(longest)[None] < torch.tensor(lengths)[:, None])[:, None, None]
    actual = attend(q, *merge_source(k, v, mask, capacity))
    for b, length in enumerate(lengths):
        for h in range(H):
            slots = [Slot(1, k[b, h, t], v[b, h, t]) for t in range(length)]
            while len(slots) > capacity:
                merge_cheapest(slots, len(slots))
            for t in range(4):
                expected = attend_by_reference(q[b, h, t], slots)
                torch.testing.assert_close(actual[b, h, t], expected, rtol=1e-5, atol=1e-6)


def test_a_source_that_fits_is_left_as_it_is() -> None:
    k, v, mask = draw(B, H, 5, D), draw(B, H, 5, D, seed=1), torch.ones(B, 1, 1, 5, dtype=torch.bool)
    view = merge_source(k, v, mask, 5)
    assert view[0] is k and view[1] is v and view[2] is mask


def test_gradients_of_merged_sources() -> None:
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])[:, None, None]
    k, v = draw(2, 1, 6, D).double().requires_grad_(), draw(2, 1, 6, D, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda k, v: merge_source(k, v, mask, 3)[:2], (k, v))


# --------------------------------------------------------------------------------------------------------- whole models


def build_model(capacity: int | None) -> CvmTransformer:
    sizes = ModelConfig(
        dim=32,
        num_heads=4,
        feed_forward_dim=48,
        encoder_layers=1,
        decoder_layers=2,
        max_length=40,
        core_capacity=capacity,
    )
    model = CvmTransformer(sizes, VOCABULARY)
    init_random(model, seed=3)
    return model.eval()


def draw_ids(*lengths: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
@pytest.mark.parametrize("capacity", [None, 2, 3, 7, 16])
def test_teacher_forced_and_incremental_logits_agree(capacity: int | None) -> None:
    model = build_model(capacity)
    src, src_mask = pad_sources(draw_ids(20, 9, 2), "cpu")
    targets = torch.tensor(draw_ids(24, 24, 24, seed=1))
    hidden, matrix = model(src, src_mask, targets)
    state = model.start(model.encode(src, src_mask), src_mask)
    steps = torch.stack([model.step(targets[:, t], state) for t in range(targets.shape[1])], dim=1)
    torch.testing.assert_close(steps, hidden @ matrix.T, rtol=0.0, atol=1e-5)


@torch.no_grad()
def test_enough_slots_are_full_attention() -> None:
    src, src_mask = pad_sources(draw_ids(20, 9, 2), "cpu")
    targets = torch.tensor(draw_ids(21, 21, 21, seed=1))
    (full, _), (slots, _), (few, _) = (build_model(s)(src, src_mask, targets) for s in (None, 21, 4))
    assert torch.equal(full, slots)
    assert not torch.allclose(full, few, atol=1e-3)


@pytest.mark.parametrize("beam_size", [1, 3])
def test_translations_do_not_depend_on_the_batch(beam_size: int) -> None:
    model, sources = build_model(3), draw_ids(18, 5, 11, 2, seed=4)
    together = translate_ids(model, sources, beam_size=beam_size, batch_size=12)
    assert together == [translate_ids(model, [source], beam_size=beam_size)[0] for source in sources]


def test_training_in_bfloat16_reaches_every_weight() -> None:
    model = build_model(3).train()
    src, src_mask = pad_sources(draw_ids(20, 9, 2), "cpu")
    with torch.autocast("cpu", torch.bfloat16):
        hidden, matrix = model(src, src_mask, torch.tensor(draw_ids(12, 12, 12, seed=1)))
        loss = (hidden @ matrix.T).float().logsumexp(-1).mean()
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


@torch.no_grad()
def test_slots_under_fake_quantisation_and_in_int8() -> None:
    """The deployed model decodes with slots what the rounded one computes in parallel."""
    model = build_model(3)
    model.set_fake_quantization(True)
    src, src_mask = pad_sources(draw_ids(20, 9), "cpu")
    targets = torch.tensor(draw_ids(12, 12, seed=1))
    hidden, matrix = model(src, src_mask, targets)
    deployed = convert_with_plan(model, find_fake_plan(model))
    assert deployed.config.core_capacity == 3
    state = deployed.start(deployed.encode(src, src_mask), src_mask)
    steps = torch.stack([deployed.step(targets[:, t], state) for t in range(targets.shape[1])], dim=1)
    expected = hidden @ matrix.T
    assert (steps - expected).abs().mean() < 0.05 * expected.std()


def test_a_capacity_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="core_capacity"):
        ModelConfig(core_capacity=1)
