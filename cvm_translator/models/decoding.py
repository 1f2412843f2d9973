"""Translating: exact greedy and beam search over token ids, in length-sorted batches.

Guarantees: each result is that of the sentence alone, up to float rounding (which rounded activations, on the 8-bit
grid or in the bfloat16 of 4-bit kernels, may turn into one of their steps), whatever it is batched with; results come
in the order of the sources. bos, pad and unk are never generated (byte fallback spells what the vocabulary lacks).
Sentences that are done leave the batch. Every number format is searched by the same code with the same cache; a model
with fake quantisation on is converted first, so what is decoded is the deployed arithmetic.

Beam search keeps `beam_size` open hypotheses a sentence and scores finished ones by log-probability / length **
length_penalty, the end mark counted. An end mark counts as finished when it is among the best `beam_size`
continuations; a sentence is done when it has `beam_size` finished hypotheses or reaches its length limit, where open
ones are taken as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from cvm_translator.models.packing import PackedEmbedding, packed_layers
from cvm_translator.models.screening import find_largest
from cvm_translator.models.transformer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, CvmTransformer, DecoderState
from cvm_translator.quantization import TiedEmbedding, convert_with_plan, find_fake_plan

COMPACT_BELOW = 0.75
"""Done sentences leave the batch when fewer than this share of its rows is still open: leaving costs a copy."""


MAX_LENGTH_RATIO, MAX_LENGTH_EXTRA = 2.0, 10
"""A translation has at most ratio × (source length) + extra tokens."""


class TextTokenizer(Protocol):
    def encode(self, texts: list[str]) -> list[list[int]]: ...

    def decode(self, ids: list[list[int]]) -> list[str]: ...


@torch.inference_mode()
def translate_ids(
    model: CvmTransformer,
    sources: Sequence[Sequence[int]],
    *,
    beam_size: int = 1,
    batch_size: int = 128,
    max_length_ratio: float = MAX_LENGTH_RATIO,
    max_length_extra: int = MAX_LENGTH_EXTRA,
    length_penalty: float = 1.0,
    device: torch.device | str | None = None,
    on_batch: Callable[[], object] | None = None,
) -> list[list[int]]:
    """Translate sources (ids without end mark, at most max_length − 1 each); results hold no special ids.

    A result has at most max_length_ratio × (source length) + max_length_extra tokens, and at most max_length − 1.
    `batch_size` counts rows, so beams share it. `device` defaults to the model's. `on_batch` is
    called before each batch.
    """
    longest = model.config.max_length - 1
    for source in sources:
        if not 0 < len(source) <= longest:
            raise ValueError(f"a source of {len(source)} tokens: between 1 and {longest} can be translated")
    if any(isinstance(m, TiedEmbedding) and m.fake_quantization for m in model.modules()):
        model = convert_with_plan(model, find_fake_plan(model))
    device = model.positions.device if device is None else torch.device(device)
    was_training = model.training
    model.to(device).eval()
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]), reverse=True)
    results: list[list[int]] = [[] for _ in sources]
    sentences = max(1, batch_size // beam_size)
    try:
        with packed_layers(model):
            for start in range(0, len(order), sentences):
                if on_batch is not None:
                    on_batch()
                chosen = order[start : start + sentences]
                src, src_mask = pad_sources([sources[i] for i in chosen], device)
                limits = [min(int(max_length_ratio * len(sources[i])) + max_length_extra, longest) for i in chosen]
                if beam_size == 1:
                    outputs = _greedy(model, src, src_mask, limits)
                else:
                    outputs = _beam(model, src, src_mask, limits, beam_size, length_penalty)
                for i, output in zip(chosen, outputs, strict=True):
                    results[i] = output
    finally:
        model.train(was_training)
    return results


def pad_sources(sources: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Sources with the end mark added, padded on the right: ids (B, S) and mask (B, S), True at real tokens."""
    length = max(len(source) for source in sources) + 1
    src = torch.tensor([[*source, EOS_ID, *[PAD_ID] * (length - 1 - len(source))] for source in sources])
    lengths = torch.tensor([len(source) + 1 for source in sources])
    mask = torch.arange(length)[None] < lengths[:, None]
    return src.to(device), mask.to(device)


_FORBIDDEN = [BOS_ID, PAD_ID, UNK_ID]


def forbid_specials(logits: Tensor) -> Tensor:
    """Make bos, pad and unk impossible, in place."""
    for index in _FORBIDDEN:
        logits[:, index] = -math.inf
    return logits


def _choose(model: CvmTransformer, hidden: Tensor, state: DecoderState) -> Tensor:
    """The best tokens (R,) after hidden states (R, D)."""
    embedding: nn.Module = model.embedding
    if isinstance(embedding, PackedEmbedding):
        return embedding.choose(hidden, _FORBIDDEN)
    logits = forbid_specials(model.embedding.project(hidden, state.matrix))
    return find_largest(logits) if logits.device.type == "cpu" else logits.argmax(-1)


def _greedy(model: CvmTransformer, src: Tensor, src_mask: Tensor, limits: list[int]) -> list[list[int]]:
    state = model.start(model.encode(src, src_mask), src_mask)
    outputs: list[list[int]] = [[] for _ in limits]
    rows = list(range(len(limits)))  # which sentence each row of the batch belongs to
    tokens = torch.full((len(rows),), EOS_ID, device=src.device)
    is_open = [True] * len(rows)
    while any(is_open):
        tokens = _choose(model, model.advance(tokens, state), state)
        for row, token in enumerate(tokens.tolist()):  # a sync point, once a step
            if is_open[row]:
                output = outputs[rows[row]]
                if token != EOS_ID:
                    output.append(token)
                is_open[row] = token != EOS_ID and len(output) < limits[rows[row]]
        if 0 < sum(is_open) < COMPACT_BELOW * len(rows):
            kept = [row for row in range(len(rows)) if is_open[row]]
            index = torch.tensor(kept, device=src.device)
            state.select(index)
            tokens, rows, is_open = tokens[index], [rows[row] for row in kept], [True] * len(kept)
    return outputs


class _Beams:
    """The hypotheses of one sentence: open ones with their scores, and the best finished one."""

    def __init__(self, beam_size: int, limit: int, length_penalty: float) -> None:
        self.beam_size, self.limit, self.length_penalty = beam_size, limit, length_penalty
        self.open: list[tuple[float, list[int]]] = []
        self.num_finished = 0
        self.best: tuple[float, list[int]] = (-math.inf, [])

    def _finish(self, score: float, tokens: list[int], length: int) -> None:
        self.num_finished += 1
        normalised = score / length**self.length_penalty
        if normalised > self.best[0]:
            self.best = (normalised, tokens)

    def extend(self, candidates: list[tuple[float, int, int]]) -> list[int]:
        """Take the best continuations (score, beam, token), best first; returns the beam each new open one came
        from."""
        parents: list[int] = []
        extended: list[tuple[float, list[int]]] = []
        for rank, (score, beam, token) in enumerate(candidates):
            if score == -math.inf or len(extended) == self.beam_size:
                break
            tokens = self.open[beam][1] if self.open else []
            if token == EOS_ID:
                if rank < self.beam_size:
                    self._finish(score, tokens, len(tokens) + 1)
            else:
                extended.append((score, [*tokens, token]))
                parents.append(beam)
        self.open = extended
        return parents

    def is_done(self) -> bool:
        """Whether the search of this sentence is over; open hypotheses at the limit are taken as they are."""
        if self.num_finished >= self.beam_size or not self.open:
            return True
        if len(self.open[0][1]) < self.limit:
            return False
        for score, tokens in self.open:
            self._finish(score, tokens, len(tokens))
        return True


def _beam(
    model: CvmTransformer, src: Tensor, src_mask: Tensor, limits: list[int], beam_size: int, length_penalty: float
) -> list[list[int]]:
    sentences = [_Beams(beam_size, limit, length_penalty) for limit in limits]
    state = model.start(model.encode(src, src_mask), src_mask, beam_size)
    active = list(range(len(sentences)))
    scores = torch.full((len(active), beam_size), -math.inf, device=src.device)
    scores[:, 0] = 0.0  # at the start all beams are equal: only the first counts
    tokens = torch.full((len(active) * beam_size,), EOS_ID, device=src.device)
    while active:
        log_probs = forbid_specials(model.step(tokens, state)).float().log_softmax(-1)
        vocab_size = log_probs.shape[1]
        totals = (log_probs + scores.view(-1, 1)).view(len(active), -1)
        best, flat = totals.topk(min(2 * beam_size, totals.shape[1]), dim=-1)
        next_rows: list[int] = []
        next_tokens: list[int] = []
        next_scores: list[list[float]] = []
        kept: list[int] = []
        for place, (sentence_scores, indices) in enumerate(zip(best.tolist(), flat.tolist(), strict=True)):
            beams = sentences[active[place]]
            candidates = [(s, i // vocab_size, i % vocab_size) for s, i in zip(sentence_scores, indices, strict=True)]
            parents = beams.extend(candidates)
            if beams.is_done():
                continue
            missing = beam_size - len(parents)  # fewer only where the vocabulary is tiny
            kept.append(place)
            next_rows += [place * beam_size + parent for parent in parents + [0] * missing]
            next_tokens += [tokens[-1] for _, tokens in beams.open] + [EOS_ID] * missing
            next_scores.append([score for score, _ in beams.open] + [-math.inf] * missing)
        if not kept:
            break
        row_index = torch.tensor(next_rows, device=src.device)
        if len(kept) < len(active):
            state.select(row_index, torch.tensor(kept, device=src.device))
        else:
            state.reorder(row_index)
        active = [active[place] for place in kept]
        tokens = torch.tensor(next_tokens, device=src.device)
        scores = torch.tensor(next_scores, device=src.device)
    return [beams.best[1] for beams in sentences]


def translate_texts(
    model: CvmTransformer,
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    *,
    beam_size: int = 1,
    batch_size: int = 128,
    device: torch.device | str | None = None,
    on_batch: Callable[[], object] | None = None,
) -> list[str]:
    """`translate_lines` with the model itself."""

    def translate(sources: list[list[int]]) -> list[list[int]]:
        return translate_ids(
            model, sources, beam_size=beam_size, batch_size=batch_size, device=device, on_batch=on_batch
        )

    return translate_lines(tokenizer, texts, model.config.max_length - 1, translate)


def translate_lines(
    tokenizer: TextTokenizer,
    texts: Sequence[str],
    longest: int,
    translate: Callable[[list[list[int]]], list[list[int]]],
) -> list[str]:
    """Translate lines of text, whatever runtime turns ids into ids.

    An empty line stays empty; a line of more than `longest` tokens is translated in pieces, cut between words (where a
    word alone is longer, within it), whose translations are joined by spaces.
    """
    pieces: list[list[int]] = []
    owners: list[int] = []
    filled = [i for i, text in enumerate(texts) if text.strip()]
    for i, ids in zip(filled, tokenizer.encode([texts[i] for i in filled]), strict=True):
        parts = [ids] if len(ids) <= longest else split_long(tokenizer, texts[i], longest)
        pieces += [part for part in parts if part]
        owners += [i for part in parts if part]
    translated: list[list[str]] = [[] for _ in texts]
    for i, text in zip(owners, tokenizer.decode(translate(pieces)), strict=True):
        translated[i].append(text)
    return [" ".join(parts) for parts in translated]


def split_long(tokenizer: TextTokenizer, text: str, longest: int) -> list[list[int]]:
    """Cut a text into pieces of at most `longest` tokens, preferably after the last sentence end in a piece's second
    half."""
    words = text.split()
    counts = [len(ids) for ids in tokenizer.encode(words)]
    pieces: list[list[int]] = []
    start = 0
    while start < len(words):
        end, total = start, 0
        while end < len(words) and total + counts[end] <= longest:
            total += counts[end]
            end += 1
        if end < len(words):
            ends = [i for i in range(start + (end - start) // 2, end) if words[i][-1] in ".!?:;"]
            end = ends[-1] + 1 if ends else max(end, start + 1)
        ids = tokenizer.encode([" ".join(words[start:end])])[0]
        pieces += [ids[i : i + longest] for i in range(0, len(ids), longest)]
        start = end
    return pieces
