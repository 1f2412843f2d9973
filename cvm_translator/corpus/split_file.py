"""The pairs of a split, read from its file when they are asked for."""

from __future__ import annotations

import functools
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from cvm_translator.corpus.records import Pair

SCAN_BYTES = 1 << 26


class SplitFile(Sequence[Pair]):
    """A file of source, target and origin, a pair a line; memory: 8 bytes a pair once one was asked for."""

    def __init__(self, path: Path, num_pairs: int, sha256: str) -> None:
        self.path = path
        self.sha256 = sha256
        """Of the file."""
        self._num_pairs = num_pairs

    def __len__(self) -> int:
        return self._num_pairs

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]  # negative ones too; IndexError beyond the ends
        return parse_line(self._bytes[self.offsets[place] : self.offsets[place + 1]])

    def __iter__(self) -> Iterator[Pair]:
        with open(self.path, "rb") as stream:
            yield from map(parse_line, stream)

    @functools.cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(N + 1,) where each line begins."""
        ends: list[NDArray[np.int64]] = [np.zeros(1, dtype=np.int64)]
        with open(self.path, "rb") as stream:
            begin = 0
            while block := stream.read(SCAN_BYTES):
                ends.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + begin + 1)
                begin += len(block)
        return np.concatenate(ends)

    @functools.cached_property
    def _bytes(self) -> mmap.mmap | bytes:
        with open(self.path, "rb") as stream:
            return mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if len(self) else b""


def parse_line(line: bytes) -> Pair:
    return Pair(*line.decode("utf-8").rstrip("\n").split("\t"))
