"""Multi-head attention through PyTorch's scaled_dot_product_attention, with the maths of M2M100.

Queries are scaled by (D / H)^-1/2, all four projections have biases. Projections that share their input are one
matrix product: query, key, value in self-attention (`qkv`), key and value in cross-attention (`kv`). For decoding
token by token, keys and values are kept in an `AttentionCache` and only the new token is computed.

One exception: in bfloat16 on a CPU the two products and the softmax are written out, because the backward pass of
PyTorch's kernel is six to seven times slower there (7.3 ms against 1.1 ms for 32 × 14 tokens, torch 2.13, one Zen 5
core).

Shapes: B batch, T target or S source length, D hidden size, H heads, d = D / H.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from cvm_translator.quantization import QuantizableLinear


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool = False) -> Tensor:
    """softmax(q · k^T / √d) · v for q (B, H, T, d), k and v (B, H, S, d); mask True where attention is allowed."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (B, H, T, S)
    if causal:
        scores = scores + torch.full(scores.shape[-2:], -math.inf, dtype=scores.dtype).triu_(1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    y: Tensor = scores.softmax(-1) @ v
    return y


class AttentionCache:
    """Keys and values of the tokens so far, (B, H, capacity, d) each, of which `length` are in use.

    The capacity doubles when it is used up, so appending copies each element twice at most.
    """

    def __init__(self, batch_size: int, num_heads: int, head_dim: int, like: Tensor, capacity: int = 16) -> None:
        shape = (batch_size, num_heads, capacity, head_dim)
        self.keys, self.values = like.new_empty(shape), like.new_empty(shape)
        self.length = 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add one token, (B, H, d) each; returns all keys and values so far, (B, H, length, d)."""
        if self.length == self.keys.shape[2]:
            self.keys = torch.cat((self.keys, torch.empty_like(self.keys)), dim=2)
            self.values = torch.cat((self.values, torch.empty_like(self.values)), dim=2)
        self.keys[:, :, self.length] = keys
        self.values[:, :, self.length] = values
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def select(self, rows: Tensor) -> None:
        """Keep the given rows, in the given order; rows may repeat."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)


class SelfAttention(nn.Module):
    """Attention of a sequence to itself."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = QuantizableLinear(dim, 3 * dim)
        self.out = QuantizableLinear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None, *, causal: bool = False) -> Tensor:
        """x (B, T, D), mask broadcastable to (B, H, T, T) with True where attention is allowed -> (B, T, D)."""
        batch, length, dim = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, dim // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, d) each
        y = attend(q, k, v, mask, causal=causal)
        out: Tensor = self.out(y.transpose(1, 2).reshape(batch, length, dim))
        return out

    def step(self, x: Tensor, cache: AttentionCache) -> Tensor:
        """One new token of each row, x (B, D), attends to all tokens so far -> (B, D)."""
        batch, dim = x.shape
        q, k, v = self.qkv(x).view(batch, 3, self.num_heads, dim // self.num_heads).unbind(1)  # (B, H, d) each
        keys, values = cache.append(k, v)
        y = attend(q.unsqueeze(2), keys, values, None)
        out: Tensor = self.out(y.reshape(batch, dim))
        return out


class CrossAttention(nn.Module):
    """Attention of the target to the encoded source."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = QuantizableLinear(dim, dim)
        self.kv = QuantizableLinear(dim, 2 * dim)
        self.out = QuantizableLinear(dim, dim)

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, S, d) of the memory (B, S, D)."""
        batch, length, dim = memory.shape
        kv = self.kv(memory).view(batch, length, 2, self.num_heads, dim // self.num_heads)
        keys, values = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return keys, values

    def attend(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """x (R, T, D) with R a multiple of B: consecutive rows share a source (beams) -> (R, T, D)."""
        rows, length, dim = x.shape
        sources = keys.shape[0]
        q = self.q(x).view(sources, -1, self.num_heads, dim // self.num_heads).transpose(1, 2)  # (B, H, R/B·T, d)
        y = attend(q, keys, values, mask)
        out: Tensor = self.out(y.transpose(1, 2).reshape(rows, length, dim))
        return out

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        """x (B, T, D), memory (B, S, D), mask (B, 1, 1, S) with True where attention is allowed -> (B, T, D)."""
        return self.attend(x, *self.project_memory(memory), mask)
