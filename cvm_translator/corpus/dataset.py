"""Pairs as flat token arrays, and batches of them as padded tensors.

Memory: 32 bytes a pair. The token ids of a training set stay in their memory-mapped files, those of a small one take 4
bytes each.
Layout of a batch (ids: bos 0, pad 1, eos 2): the source ends with eos; the decoder's input starts with eos and its
expected output ends with eos, so both have one position more than the target has tokens.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cvm_translator.corpus.records import Pair
from cvm_translator.corpus.tokenizer import EOS_ID, PAD_ID, Tokenizer
from cvm_translator.corpus.tokens import Side, TokenFiles

ENCODE_CHUNK = 10_000


@dataclass(frozen=True)
class Batch:
    """Padded tensors of some sentences."""

    src: torch.Tensor
    """(B, S) source tokens and eos, padded with 1."""
    src_mask: torch.Tensor
    """(B, S) True at real tokens, eos included."""
    tgt_in: torch.Tensor
    """(B, T) eos and target tokens."""
    tgt_out: torch.Tensor
    """(B, T) target tokens and eos."""
    lengths: NDArray[np.int32]
    """(B, 2) real source and target tokens of each sentence, eos included; on the host, so that to count them waits for
    no device."""
    indices: NDArray[np.int64]
    """(B,) places of the pairs in the dataset: stable ids for what is stored by example."""
    stored: tuple[torch.Tensor, ...] = ()
    """What is stored of the teacher at the real target tokens of the flattened batch, each (N, …); empty: not read."""

    @property
    def num_source_tokens(self) -> int:
        """Real source tokens, eos included."""
        return int(self.lengths[:, 0].sum())

    @property
    def num_tokens(self) -> int:
        """Real target tokens, eos included: the tokens over which losses are averaged."""
        return int(self.lengths[:, 1].sum())

    def __len__(self) -> int:
        return self.src.shape[0]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same in page-locked memory, from which a CUDA device copies without waiting."""
        return self._map(torch.Tensor.pin_memory)

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All that lies on a device."""
        return self.src, self.src_mask, self.tgt_in, self.tgt_out, *self.stored

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        src, src_mask, tgt_in, tgt_out, *stored = map(change, self.tensors)
        return Batch(src, src_mask, tgt_in, tgt_out, self.lengths, self.indices, tuple(stored))

    def split(self, num_parts: int) -> list[Batch]:
        """Micro-batches of nearly equal sentence counts, in order, without needless padding."""
        if num_parts == 1:
            return [self]
        bounds = np.linspace(0, len(self), min(num_parts, len(self)) + 1).round().astype(int).tolist()
        return [self._cut(begin, end) for begin, end in itertools.pairwise(bounds)]

    def _cut(self, begin: int, end: int) -> Batch:
        lengths = self.lengths[begin:end]
        src_end, tgt_end = lengths.max(axis=0).tolist()
        first = int(self.lengths[:begin, 1].sum())
        tokens = slice(first, first + int(lengths[:, 1].sum()))
        return Batch(
            self.src[begin:end, :src_end].contiguous(),  # a compiler takes tensors with gaps for another program
            self.src_mask[begin:end, :src_end].contiguous(),
            self.tgt_in[begin:end, :tgt_end].contiguous(),
            self.tgt_out[begin:end, :tgt_end].contiguous(),
            lengths,
            self.indices[begin:end],
            tuple(rows[tokens] for rows in self.stored),
        )


class DistillationDataset:
    """Tokenised sentence pairs."""

    def __init__(
        self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], max_length: int | None = None
    ) -> None:
        """Build from ids without marks; pairs with a side over `max_length` tokens, eos included, are dropped."""
        if len(sources) != len(targets):
            raise ValueError(f"{len(sources)} sources but {len(targets)} targets")
        self._set(flatten(sources), flatten(targets), max_length, sha256=None)

    @classmethod
    def from_pairs(
        cls, pairs: Sequence[Pair], tokenizer: Tokenizer, max_length: int | None = None
    ) -> DistillationDataset:
        """Tokenise pairs; over-long ones are dropped and counted."""
        sides: tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]] = ([], [])
        for begin in range(0, len(pairs), ENCODE_CHUNK):
            chunk = pairs[begin : begin + ENCODE_CHUNK]
            for rows, texts in zip(sides, zip(*(pair[:2] for pair in chunk), strict=True), strict=True):
                rows.extend(np.array(ids, dtype=np.int32) for ids in tokenizer.encode(texts))
        return cls(*sides, max_length)  # type: ignore[arg-type]

    @classmethod
    def from_files(cls, files: TokenFiles, max_length: int | None = None) -> DistillationDataset:
        """The pairs of token files, of which nothing but lengths and places is held in memory."""
        dataset = cls.__new__(cls)
        dataset._set(files.source, files.target, max_length, sha256=files.sha256)
        return dataset

    def _set(self, source: Side, target: Side, max_length: int | None, sha256: str | None) -> None:
        self._source, self._target = source, target
        lengths = np.empty((len(source.offsets) - 1, 2), dtype=np.int32)
        for column, side in enumerate((source, target)):
            lengths[:, column] = side.lengths
        fits = lengths.max(axis=1) < (max_length if max_length is not None else 1 << 30)
        self.kept: NDArray[np.int64] = np.flatnonzero(fits)
        """(N,) places of the kept pairs in the input."""
        self.num_dropped = len(lengths) - len(self.kept)
        self.lengths: NDArray[np.int32] = lengths[fits]
        """(N, 2) tokens of source and target, without marks."""
        self._files_sha256 = sha256

    def __len__(self) -> int:
        return len(self.kept)

    @functools.cached_property
    def sha256(self) -> str:
        """Hash of every token id, where each pair begins, and which pairs are kept."""
        digest = hashlib.sha256(self.kept.tobytes())
        if self._files_sha256 is not None:
            digest.update(self._files_sha256.encode())
            return digest.hexdigest()
        for side in (self._source, self._target):
            digest.update(side.offsets.tobytes())
            digest.update(side.tokens.tobytes())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]:
        """Source and target ids of one pair, without marks."""
        place = int(self.kept[index])
        return self._source[place], self._target[place]

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        """The pairs at `indices`, in that order, padded to the longest."""
        places = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[places] + 1
        source_end, target_end = lengths.max(axis=0).tolist()
        src = _pad(self._source, self.kept[places], lengths[:, 0], source_end)
        tgt_out = _pad(self._target, self.kept[places], lengths[:, 1], target_end)
        tgt_in = np.full_like(tgt_out, PAD_ID)
        tgt_in[:, 0] = EOS_ID
        is_before_end = np.arange(1, target_end) < lengths[:, 1:]
        tgt_in[:, 1:][is_before_end] = tgt_out[:, :-1][is_before_end]
        src_mask = np.arange(source_end) < lengths[:, :1]
        return Batch(
            torch.from_numpy(src),
            torch.from_numpy(src_mask),
            torch.from_numpy(tgt_in),
            torch.from_numpy(tgt_out),
            lengths,
            places,
        )


def _pad(side: Side, places: NDArray[np.int64], lengths: NDArray[np.int32], end: int) -> NDArray[np.int64]:
    """(B, end) ids of the sentences at `places`, each with its end mark, of `lengths` with it, and padding."""
    columns = np.arange(end)
    rows = np.where(columns < lengths[:, None], EOS_ID, PAD_ID)
    is_token = columns < lengths[:, None] - 1
    rows[is_token] = side.tokens[(side.offsets[places][:, None] + columns)[is_token]]
    return rows


def flatten(rows: Sequence[Sequence[int]]) -> Side:
    """Rows of ids as one side."""
    offsets = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    tokens = np.empty(int(offsets[-1]), dtype=np.int32)
    for index, row in enumerate(rows):
        tokens[offsets[index] : offsets[index + 1]] = row
    return Side(tokens, offsets)
