"""Count-Vector-Merge memory: at most s key/value slots, however many tokens attention has seen.

A slot is a run of neighbouring tokens: their *count* n and the means of their key and value *vectors*. Where there is
one slot too many, the two neighbours a, b with the least

    n_a · n_b / (n_a + n_b) · ‖k_a − k_b‖²

*merge*: what the merger adds to the squared distance of the keys from their slots' means (Ward's criterion), in
float32, the leftmost of equals. Attention adds log n to a slot's logit, so a slot weighs what its tokens would if all
had the slot's mean logit; this is the same as softmax attention over tokens whose logits are averaged within their
slots, which is how training computes it for all target positions at once, once a loop over the positions has found the
slots. Which slots merge carries no gradient.

Self-attention appends one token at a time and never merges the newest slot (so s is at least 2); cross-attention takes
all source tokens of a sentence, padding left out, and merges until s slots are left. Each layer, head and sentence
merges for itself. A rounding error can turn the choice between two pairs that cost nearly the same, and what follows
differs by more than rounding then: "up to float rounding", as said of decoding elsewhere, has this exception.

Shapes: B batch, H heads, R = B · H, L slots, T target and S source length, d size of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


class _Slots:
    """Key means (R, L, d) and counts (R, L) of slots, of which each row's first `lengths` are in use."""

    def __init__(self, keys: Tensor, counts: Tensor, values: Tensor | None = None) -> None:
        self.keys, self.counts, self.values = keys, counts, values

    def append(self, keys: Tensor, values: Tensor | None = None) -> None:
        """One more token of each row, (R, d)."""
        self.keys = torch.cat((self.keys, keys[:, None]), dim=1)
        self.counts = torch.cat((self.counts, self.counts.new_ones(len(keys), 1)), dim=1)
        if self.values is not None and values is not None:
            self.values = torch.cat((self.values, values[:, None]), dim=1)

    def find_cheapest(self, num_slots: int) -> Tensor:
        """(R,) the left one of the cheapest pair among the first `num_slots` slots; unused ones (count 0) cost ∞."""
        counts = self.counts[:, :num_slots]
        left, right = counts[:, :-1], counts[:, 1:]
        distances = (self.keys[:, 1:num_slots] - self.keys[:, : num_slots - 1]).square().sum(-1)
        costs = left * right / (left + right).clamp(min=1.0) * distances
        return costs.masked_fill(right == 0, torch.inf).argmin(-1)

    def merge(self, at: Tensor, is_active: Tensor | None = None) -> None:
        """Merge slots `at` (R,) and the one after it; rows that are not active lose their last, unused slot instead."""
        num_kept = self.counts.shape[1] - 1
        places = torch.arange(num_kept, device=at.device)
        is_after = places > at[:, None]
        is_merged = places == at[:, None]
        if is_active is not None:
            is_after, is_merged = is_after & is_active[:, None], is_merged & is_active[:, None]
        source = places + is_after  # (R, L − 1): where each kept slot was
        next_counts = self.counts[:, 1:] * is_merged
        counts = self.counts.gather(1, source)
        share = (next_counts / (counts + next_counts).clamp(min=1.0))[..., None]  # of the right slot in the merged one
        self.keys = self._join(self.keys, source, share)
        if self.values is not None:
            self.values = self._join(self.values, source, share)
        self.counts = counts + next_counts

    @staticmethod
    def _join(means: Tensor, source: Tensor, share: Tensor) -> Tensor:
        kept = means.gather(1, source[..., None].expand(-1, -1, means.shape[-1]))
        return torch.where(share > 0, kept + share * (means[:, 1:] - kept), kept)


# ------------------------------------------------------------------------------------------------------ self-attention


class SlotCache:
    """What self-attention remembers of each row while it decodes: like `AttentionCache`, in at most `capacity` slots.

    Means are in float32, whatever the type of the model.
    """

    def __init__(self, batch_size: int, num_heads: int, head_dim: int, like: Tensor, capacity: int) -> None:
        rows = batch_size * num_heads
        empty = like.new_empty((rows, 0, head_dim), dtype=torch.float32)
        self._slots = _Slots(empty, empty.new_empty((rows, 0)), empty)
        self._num_heads, self._capacity, self._type = num_heads, capacity, like.dtype

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add one token, (B, H, d) each; returns keys and values of the slots, (B, H, L, d), and what is added to their
        logits, (B, H, 1, L)."""
        slots = self._slots
        slots.append(keys.flatten(0, 1).float(), values.flatten(0, 1).float())
        if slots.counts.shape[1] > self._capacity:
            slots.merge(slots.find_cheapest(self._capacity))
        keys, values, counts = self.tensors
        return keys.to(self._type), values.to(self._type), counts.log().unsqueeze(2)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """What is remembered: means of keys and values, (B, H, L, d) each, and counts, (B, H, L)."""
        slots = self._slots
        assert slots.values is not None
        keys, values, counts = (
            rows.view(-1, self._num_heads, *rows.shape[1:]) for rows in (slots.keys, slots.values, slots.counts)
        )
        return keys, values, counts

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, in the given order; rows may repeat."""
        slots, heads = self._slots, torch.arange(self._num_heads, device=rows.device)
        index = (rows[:, None] * self._num_heads + heads).flatten()
        slots.keys, slots.counts = slots.keys.index_select(0, index), slots.counts.index_select(0, index)
        assert slots.values is not None
        slots.values = slots.values.index_select(0, index)


@torch.no_grad()
def find_self_slots(keys: Tensor, capacity: int) -> Tensor:
    """For keys (B, H, T, d): the slot of each token j as position t sees it, (B, H, T, T) int64; 0 where j > t."""
    batch, heads, length, _ = keys.shape
    keys = keys.float().flatten(0, 1)
    slots = _Slots(keys[:, :0], keys.new_empty((len(keys), 0)))
    seen = keys.new_zeros((len(keys), length, length), dtype=torch.int64)
    current = keys.new_zeros((len(keys), length), dtype=torch.int64)
    for t in range(length):
        slots.append(keys[:, t])
        current[:, t] = slots.counts.shape[1] - 1
        if slots.counts.shape[1] > capacity:
            at = slots.find_cheapest(capacity)
            slots.merge(at)
            current[:, : t + 1] -= (current[:, : t + 1] > at[:, None]).long()
        seen[:, t, : t + 1] = current[:, : t + 1]
    return seen.view(batch, heads, length, length)


def average_within_slots(logits: Tensor, slots: Tensor, capacity: int) -> Tensor:
    """Causal logits (B, H, T, T), each replaced by the mean over its slot; those of later tokens stay as they are."""
    length = logits.shape[-1]
    is_seen = torch.ones(length, length, dtype=torch.bool, device=logits.device).tril()
    wide = _wide(logits)
    shape = (*logits.shape[:-1], capacity)
    sums = wide.new_zeros(shape).scatter_add(-1, slots, wide * is_seen)
    counts = wide.new_zeros(shape).scatter_add(-1, slots, is_seen.to(wide.dtype).expand_as(wide).contiguous())
    means = (sums / counts.clamp(min=1.0)).gather(-1, slots)
    return torch.where(is_seen, means, wide).to(logits.dtype)


# ----------------------------------------------------------------------------------------------------- cross-attention


def merge_source(
    keys: Tensor, values: Tensor, mask: Tensor | None, capacity: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Slots of the source: keys and values (B, H, S, d), mask (B, 1, 1, S), True at real tokens, or None.

    Returns keys and values (B, H, s, d) and what is added to their logits (B, H, 1, s), −∞ where a short sentence has
    no slot; what it was given where S is at most the capacity. Gradients flow through the means.
    """
    batch, heads, length, dim = keys.shape
    if length <= capacity:
        return keys, values, mask
    slots = _find_source_slots(keys, mask, capacity)  # (B, H, S)
    is_real = _wide(keys).new_ones((batch, heads, length))
    if mask is not None:
        is_real = is_real * mask[:, :, 0]
    counts = is_real.new_zeros((batch, heads, capacity)).scatter_add(-1, slots, is_real)
    index = slots[..., None].expand(-1, -1, -1, dim)

    def average(vectors: Tensor) -> Tensor:
        sums = is_real.new_zeros((batch, heads, capacity, dim))
        sums = sums.scatter_add(2, index, _wide(vectors) * is_real[..., None])
        return (sums / counts.clamp(min=1.0)[..., None]).to(vectors.dtype)

    return average(keys), average(values), counts.log().unsqueeze(2)


@torch.no_grad()
def _find_source_slots(keys: Tensor, mask: Tensor | None, capacity: int) -> Tensor:
    """The slot of each source token, (B, H, S) int64; 0 where padded."""
    batch, heads, length, _ = keys.shape
    keys = keys.float().flatten(0, 1)
    is_real = keys.new_ones((len(keys), length))
    if mask is not None:
        is_real = mask[:, :, 0].expand(-1, heads, -1).flatten(0, 1).float()
    lengths = is_real.sum(-1)
    slots, current = _Slots(keys, is_real), torch.arange(length, device=keys.device).repeat(len(keys), 1)
    for num_slots in range(length, capacity, -1):
        is_active = lengths > capacity  # rows whose slots are too many: each loses one a turn
        at = slots.find_cheapest(num_slots)
        slots.merge(at, is_active)
        current -= ((current > at[:, None]) & is_active[:, None]).long()
        lengths = lengths - is_active.to(lengths.dtype)
    return (current * is_real.long()).view(batch, heads, length)
