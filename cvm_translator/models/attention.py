"""Multi-head attention through PyTorch's scaled_dot_product_attention, with the maths of M2M100.

Queries are scaled by (D / H)^-1/2, all four projections have biases. Projections that share their input are one
matrix product: query, key, value in self-attention (`qkv`), key and value in cross-attention (`kv`). For decoding
token by token, keys and values are kept in an `AttentionCache` and only the new token is computed. A decoder whose
`core_capacity` is set keeps them in that many slots instead (see `slots`).

Three exceptions. On CUDA short sentences have a kernel of their own (see `short_attention`). In bfloat16 on a CPU the
two products and the softmax are written out, because the backward pass of PyTorch's kernel is six to seven times slower
there (7.3 ms against 1.1 ms for 32 × 14 tokens, torch 2.13, one Zen 5 core); a decoding step of few heads is left to
it, for it takes a seventh of the time for 8 heads. And so they are in the self-attention of a decoder with slots while
it trains: no kernel averages logits.

Shapes: B batch, T target or S source length, D hidden size, H heads, d = D / H.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from cvm_translator.config.compilers import HAS_TRITON
from cvm_translator.models.slots import SlotCache, average_within_slots, find_self_slots, merge_source
from cvm_translator.quantization import QuantizableLinear

_FEW_HEADS = 32
"""Heads of all sentences together, up to which PyTorch's bfloat16 kernel is the faster one on a CPU."""


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool = False) -> Tensor:
    """softmax(q · k^T / √d) · v for q (B, H, T, d), k and v (B, H, S, d).

    A bool mask is True where attention is allowed; a float one is added to the logits.
    """
    if HAS_TRITON and q.device.type == "cuda" and q.shape[2] > 1:
        from cvm_translator.models.short_attention import attend_briefly, can_attend

        if can_attend(q, k, mask):
            return attend_briefly(q, k, v, mask, causal=causal)
    is_small_step = q.shape[2] == 1 and q.shape[0] * q.shape[1] <= _FEW_HEADS and not q.requires_grad
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or is_small_step:
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, S)
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, dtype=scores.dtype).triu_(1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    y: Tensor = scores.softmax(-1).to(v.dtype) @ v
    return y


class AttentionCache:
    """Keys and values of the tokens so far, (B, H, capacity, d) each, of which `length` are in use.

    The capacity doubles when it is used up, so appending copies each element twice at most.
    """

    def __init__(self, batch_size: int, num_heads: int, head_dim: int, like: Tensor, capacity: int = 16) -> None:
        shape = (batch_size, num_heads, capacity, head_dim)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add one token, (B, H, d) each; returns all keys and values so far, (B, H, length, d), and no mask."""
        if self.length == self.keys.shape[2]:
            self.keys = torch.cat((self.keys, torch.empty_like(self.keys)), dim=2)
            self.values = torch.cat((self.values, torch.empty_like(self.values)), dim=2)
        self.keys[:, :, self.length] = keys
        self.values[:, :, self.length] = values
        self.length += 1
        return *self.tensors, None

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """What is remembered: all keys and values so far, (B, H, length, d) each."""
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, in the given order; rows may repeat."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)


def attend_to_slots(q: Tensor, k: Tensor, v: Tensor, capacity: int) -> Tensor:
    """Causal attention of q to k and v, (B, H, T, d) each, as decoding with a `SlotCache` computes it, all at once."""
    length = q.shape[2]
    if length <= capacity:
        return attend(q, k, v, None, causal=True)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, T)
    logits = average_within_slots(logits, find_self_slots(k, capacity), capacity)
    is_later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu_(1)
    y: Tensor = logits.masked_fill(is_later, -math.inf).softmax(-1) @ v
    return y


class SelfAttention(nn.Module):
    """Attention of a sequence to itself; with a capacity, which only causal attention may have, in so many slots."""

    def __init__(self, dim: int, num_heads: int, capacity: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.capacity = num_heads, capacity
        self.qkv = QuantizableLinear(dim, 3 * dim)
        self.out = QuantizableLinear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None, *, causal: bool = False) -> Tensor:
        """x (B, T, D), mask broadcastable to (B, H, T, T) with True where attention is allowed -> (B, T, D)."""
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, d) each
        y = attend(q, k, v, mask, causal=causal) if self.capacity is None else attend_to_slots(q, k, v, self.capacity)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, length, dim))
        return out

    def build_cache(self, batch_size: int, like: Tensor) -> AttentionCache | SlotCache:
        """An empty cache for keys and values like (…, d)."""
        if self.capacity is None:
            return AttentionCache(batch_size, self.num_heads, like.shape[-1], like)
        return SlotCache(batch_size, self.num_heads, like.shape[-1], like, self.capacity)

    def step(self, x: Tensor, cache: AttentionCache | SlotCache) -> Tensor:
        """One new token of each row, x (B, D), attends to all tokens so far -> (B, D)."""
        batch, dim = x.shape
        q, k, v = self.qkv(x).view(batch, 3, self.num_heads, dim // self.num_heads).unbind(1)  # (B, H, d) each
        keys, values, mask = cache.append(k, v)
        y = attend(q.unsqueeze(2), keys, values, mask)
        out: Tensor = self.out(y.reshape(batch, dim))
        return out


class SourceView(NamedTuple):
    """What cross-attention sees of the source: tokens, or slots of them."""

    keys: Tensor
    """(B, H, S, d)"""
    values: Tensor
    mask: Tensor | None
    """For `attend`: (B, 1, 1, S), True at real tokens, or what is added to the logits, (B, H, 1, S)."""

    def contiguous(self) -> SourceView:
        """The same in memory of its own, which products of every step would copy it to otherwise."""
        return SourceView(self.keys.contiguous(), self.values.contiguous(), self.mask)

    def select(self, sources: Tensor) -> SourceView:
        """Keep the given sources, in the given order."""
        mask = None if self.mask is None else self.mask.index_select(0, sources)
        return SourceView(self.keys.index_select(0, sources), self.values.index_select(0, sources), mask)


class CrossAttention(nn.Module):
    """Attention of the target to the encoded source; with a capacity, to so many slots of it."""

    def __init__(self, dim: int, num_heads: int, capacity: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.capacity = num_heads, capacity
        self.q = QuantizableLinear(dim, dim)
        self.kv = QuantizableLinear(dim, 2 * dim)
        self.out = QuantizableLinear(dim, dim)

    def project_memory(self, memory: Tensor, mask: Tensor | None) -> SourceView:
        """Of the memory (B, S, D), mask (B, 1, 1, S) with True at real tokens."""
        batch, length, dim = memory.shape
        kv = self.kv(memory).view(batch, length, 2, self.num_heads, dim // self.num_heads)
        keys, values = kv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.capacity is None:
            return SourceView(keys, values, mask)
        return SourceView(*merge_source(keys, values, mask, self.capacity))

    def attend(self, x: Tensor, source: SourceView) -> Tensor:
        """x (R, T, D) with R a multiple of B: consecutive rows share a source (beams) -> (R, T, D)."""
        rows, length, dim = x.shape
        sources = source.keys.shape[0]
        q = self.q(x).view(sources, -1, self.num_heads, dim // self.num_heads).transpose(1, 2)  # (B, H, R/B·T, d)
        y = attend(q, *source)
        out: Tensor = self.out(y.transpose(1, 2).reshape(rows, length, dim))
        return out

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, T, D), memory (B, S, D), mask (B, 1, 1, S) with True where attention is allowed -> (B, T, D)."""
        return self.attend(x, self.project_memory(memory, mask))
