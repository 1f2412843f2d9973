"""Attention of short sequences: all queries and keys of a sentence and head in one block.

The kernels of long sequences work in tiles of 64 or 128 queries by as many keys, of which a sentence of fifteen tokens
fills one in twenty: at a width of 512 they took a third of a training step. Here the tile is the smallest power of two
that holds the sentence. Nothing but the output is kept for the backward pass, which makes the probabilities again; each
gradient is written once, so its bits do not depend on the order in which blocks run.

Shapes: B sentences, H heads, T queries, S keys, d = D / H.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_LENGTH = 128
"""Of queries and keys: what a block holds."""
HEAD_DIMS = (16, 32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16)


@triton.jit
def _find_probabilities(  # type: ignore[no-untyped-def]
    queries,
    keys,
    mask,
    sentence,
    num_queries,
    num_keys,
    scale,
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,
    T: tl.constexpr,
    S: tl.constexpr,
):
    """(T, S) float32; rows beyond `num_queries` hold something finite."""
    rows, columns = tl.arange(0, T), tl.arange(0, S)
    logits = tl.dot(queries, tl.trans(keys)) * scale
    is_allowed = (columns < num_keys)[None, :]
    if MASKED:
        is_real = tl.load(mask + sentence * num_keys + columns, mask=columns < num_keys, other=0)
        is_allowed = is_allowed & (is_real != 0)[None, :]
    if CAUSAL:
        is_allowed = is_allowed & (columns[None, :] <= rows[:, None])
    logits = tl.where(is_allowed, logits, -float("inf"))
    weights = tl.exp(logits - tl.max(logits, 1)[:, None])
    return weights / tl.sum(weights, 1)[:, None]


@triton.jit
def _load_rows(  # type: ignore[no-untyped-def]
    tensor, batch_stride, head_stride, token_stride, sentence, head, places, length, WIDTH: tl.constexpr
):  # fmt: skip
    """(places, d): a head of a sentence's tokens; zeros beyond its length."""
    tensor += sentence * batch_stride + head * head_stride
    pointers = tensor + places[:, None] * token_stride + tl.arange(0, WIDTH)[None, :]
    return tl.load(pointers, mask=(places < length)[:, None], other=0.0)


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, mask, out,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    num_heads, num_queries, num_keys, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, T: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One head of one sentence; out is (B, T, H, d) without gaps."""
    sentence, head = (tl.program_id(0) // num_heads).to(tl.int64), tl.program_id(0) % num_heads
    rows, columns, dims = tl.arange(0, T), tl.arange(0, S), tl.arange(0, WIDTH)
    queries = _load_rows(q, q_batch, q_head, q_token, sentence, head, rows, num_queries, WIDTH)
    keys = _load_rows(k, k_batch, k_head, k_token, sentence, head, columns, num_keys, WIDTH)
    values = _load_rows(v, v_batch, v_head, v_token, sentence, head, columns, num_keys, WIDTH)
    probabilities = _find_probabilities(
        queries, keys, mask, sentence, num_queries, num_keys, scale, CAUSAL, MASKED, T, S
    )
    mixed = tl.dot(probabilities.to(values.dtype), values)
    place = ((sentence * num_queries + rows[:, None]) * num_heads + head) * WIDTH + dims[None, :]
    tl.store(out + place, mixed.to(out.dtype.element_ty), mask=(rows < num_queries)[:, None])


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    q, k, v, mask, grad_out, grad_q, grad_k, grad_v,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    num_heads, num_queries, num_keys, scale,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, T: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One head of one sentence; the gradients are (B, T, H, d) and (B, S, H, d) without gaps."""
    sentence, head = (tl.program_id(0) // num_heads).to(tl.int64), tl.program_id(0) % num_heads
    rows, columns, dims = tl.arange(0, T), tl.arange(0, S), tl.arange(0, WIDTH)
    is_query, is_key = (rows < num_queries)[:, None], (columns < num_keys)[:, None]
    queries = _load_rows(q, q_batch, q_head, q_token, sentence, head, rows, num_queries, WIDTH)
    keys = _load_rows(k, k_batch, k_head, k_token, sentence, head, columns, num_keys, WIDTH)
    values = _load_rows(v, v_batch, v_head, v_token, sentence, head, columns, num_keys, WIDTH)
    grads = _load_rows(grad_out, o_batch, o_head, o_token, sentence, head, rows, num_queries, WIDTH)
    probabilities = _find_probabilities(
        queries, keys, mask, sentence, num_queries, num_keys, scale, CAUSAL, MASKED, T, S
    )
    grad_values = tl.dot(tl.trans(probabilities.to(grads.dtype)), grads)
    grad_probabilities = tl.dot(grads, tl.trans(values))
    mean = tl.sum(probabilities * grad_probabilities, 1)[:, None]
    grad_logits = (probabilities * (grad_probabilities - mean) * scale).to(queries.dtype)
    query_place = ((sentence * num_queries + rows[:, None]) * num_heads + head) * WIDTH + dims[None, :]
    key_place = ((sentence * num_keys + columns[:, None]) * num_heads + head) * WIDTH + dims[None, :]
    tl.store(grad_q + query_place, tl.dot(grad_logits, keys).to(grad_q.dtype.element_ty), mask=is_query)
    tl.store(grad_k + key_place, tl.dot(tl.trans(grad_logits), queries).to(grad_k.dtype.element_ty), mask=is_key)
    tl.store(grad_v + key_place, grad_values.to(grad_v.dtype.element_ty), mask=is_key)


def _block(length: int) -> int:
    """At least 16: what the matrix units take."""
    return max(16, 1 << (length - 1).bit_length())


def _launch(kernel: Any, inputs: list[Tensor], outputs: list[Tensor], mask: Tensor | None, causal: bool) -> None:
    """`inputs`: queries, keys, values and what else is read by token, (B, H, length, d) each."""
    q, k = inputs[:2]
    batch, heads, num_queries, width = q.shape
    num_keys = k.shape[2]
    real = q if mask is None else mask.expand(batch, 1, 1, num_keys).contiguous()
    strides = [stride for tensor in inputs for stride in tensor.stride()[:3]]
    largest = max(_block(num_queries), _block(num_keys))
    kernel[(batch * heads,)](
        *inputs[:3],
        real,
        *inputs[3:],
        *outputs,
        *strides,
        heads,
        num_queries,
        num_keys,
        width**-0.5,
        CAUSAL=causal,
        MASKED=mask is not None,
        T=_block(num_queries),
        S=_block(num_keys),
        WIDTH=width,
        num_warps={16: 1, 32: 2, 64: 4}.get(largest, 8),
    )


def _beside(tensor: Tensor) -> Tensor:
    """(B, L, H, d) without gaps, for a result of the shape of a (B, H, L, d)."""
    batch, heads, length, width = tensor.shape
    return tensor.new_empty((batch, length, heads, width))


def _with_dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op("cvm_translator::attend_briefly", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    out = _beside(q)
    _launch(_forward, [_with_dense_rows(tensor) for tensor in (q, k, v)], [out], mask, causal)
    return out


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    return _beside(q)


@torch.library.custom_op("cvm_translator::attend_briefly_backward", mutates_args=())
def _attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _beside(q), _beside(k), _beside(v)
    inputs = [_with_dense_rows(tensor) for tensor in (q, k, v, grad.transpose(1, 2))]
    _launch(_backward, inputs, list(grads), mask, causal)
    return grads


@_attend_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _beside(q), _beside(k), _beside(v)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.causal = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attend_backward(grad, *ctx.saved_tensors, ctx.causal)
    return *(part.transpose(1, 2) for part in grads), None, None


_attend.register_autograd(_differentiate, setup_context=_remember)


def can_attend(q: Tensor, k: Tensor, mask: Tensor | None) -> bool:
    """Whether `attend_briefly` takes these; mask (B, 1, 1, S) bool, or none."""
    return (
        q.dtype in DTYPES
        and q.shape[3] in HEAD_DIMS
        and q.shape[2] <= MAX_LENGTH
        and k.shape[2] <= MAX_LENGTH
        and (mask is None or (mask.dtype == torch.bool and mask.shape[1] == mask.shape[2] == 1))
    )


def attend_briefly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool = False) -> Tensor:
    """softmax(q · k^T / √d) · v for q (B, H, T, d), k and v (B, H, S, d); see `can_attend`."""
    out: Tensor = _attend(q, k, v, mask, causal)
    return out.transpose(1, 2)
