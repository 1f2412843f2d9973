"""The clean pairs of one role: their texts in a file, their hashes in memory.

Memory: 40 bytes a pair, and about twice that again while duplicates are sought, whatever the texts. Reading, cleaning
and hashing go in chunks through `map_in_order`, so that all cores work on a bounded number of chunks.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cvm_translator.corpus.cleaning import Rules, find_duplicates, judge_pair
from cvm_translator.corpus.parallel import map_in_order
from cvm_translator.corpus.records import BadRow, Pair, Record, Skipped
from cvm_translator.corpus.splits import Keys, draw
from cvm_translator.corpus.tally import Tally
from cvm_translator.corpus.text import hash_key, make_key

CHUNK_RECORDS = 4_000
COPY_BYTES = 1 << 24


class Numbered(NamedTuple):
    """A record and the number of the source it came from."""

    source: int
    record: Record


@dataclass
class _Counts:
    num_read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    quarantined: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _CleanChunk:
    lines: list[bytes]
    """The TSV line of each pair kept."""
    columns: NDArray[np.uint64]
    """(N, 5) hashes: the exact pair, its near-duplicate key, the keys of both sides, and the draw."""
    sources: NDArray[np.int32]
    counts: dict[int, _Counts]
    quarantine: bytes


def _clean_chunk(chunk: list[Numbered], rules: Rules, seed: int) -> _CleanChunk:
    lines: list[bytes] = []
    columns: list[tuple[int, ...]] = []
    sources: list[int] = []
    counts: dict[int, _Counts] = {}
    quarantine: list[str] = []
    for source, record in chunk:
        mine = counts.setdefault(source, _Counts())
        mine.num_read += 1
        if isinstance(record, BadRow):
            mine.quarantined[record.reason] += 1
            quarantine.append(f"{record.origin}\t{record.reason}\t{record.excerpt}\n")
        elif isinstance(record, Skipped):
            mine.dropped[record.reason] += 1
        else:
            found = judge_pair(record, rules)
            if isinstance(found, str):
                mine.dropped[found] += 1
                continue
            lines.append(f"{found.source}\t{found.target}\t{' '.join(found.origin.split())}\n".encode())
            columns.append(_hash_pair(found, seed))
            sources.append(source)
    table = np.array(columns, dtype=np.uint64).reshape(-1, 5)
    bad = "".join(quarantine).encode("utf-8", "replace")
    return _CleanChunk(lines, table, np.array(sources, dtype=np.int32), counts, bad)


def _hash_pair(pair: Pair, seed: int) -> tuple[int, ...]:
    keys = make_key(pair.source), make_key(pair.target)
    exact = hash_key(f"{pair.source}\t{pair.target}")
    return exact, hash_key("\t".join(keys)), hash_key(keys[0]), hash_key(keys[1]), draw(seed, pair)


@dataclass(frozen=True)
class Pool:
    """The pairs of one role that the filters left, by their places in the order of reading."""

    path: Path
    offsets: NDArray[np.int64]
    """(N + 1,) where each line begins."""
    keys: Keys
    """(N, 2) hashes of the near-duplicate keys of both sides."""
    draws: NDArray[np.uint64]
    """(N,) numbers that order the pairs at random, whatever order they came in."""
    places: NDArray[np.int64]
    """Lines that are no duplicates, rising; what a split takes are some of them."""

    def keep(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> Pool:
        """The same pool with some of its places."""
        return Pool(self.path, self.offsets, self.keys, self.draws, self.places[chosen])

    def __len__(self) -> int:
        return len(self.places)

    @property
    def own_keys(self) -> Keys:
        return self.keys[self.places]

    @property
    def own_draws(self) -> NDArray[np.uint64]:
        return self.draws[self.places]

    def write(self, stream: BinaryIO) -> None:
        """The lines of the places, runs of neighbours in one go."""
        if not len(self.places):
            return
        breaks = np.flatnonzero(np.diff(self.places) != 1) + 1
        first = self.places[np.concatenate([[0], breaks])]
        last = self.places[np.concatenate([breaks, [len(self.places)]]) - 1]
        begins, ends = self.offsets[first].tolist(), self.offsets[last + 1].tolist()
        with open(self.path, "rb") as lines:
            for begin, end in zip(begins, ends, strict=True):
                lines.seek(begin)
                while begin < end:
                    data = lines.read(min(COPY_BYTES, end - begin))
                    if not data:
                        raise OSError(f"{self.path} is shorter than what was written into it")
                    begin += len(data)
                    stream.write(data)


def fill_pool(
    records: Iterable[Numbered], tallies: dict[int, Tally], quarantine: BinaryIO, path: Path, rules: Rules, seed: int
) -> Pool:
    """Clean the records into the file at `path`, counting into the tallies of their sources."""
    columns: list[NDArray[np.uint64]] = [np.empty((0, 5), dtype=np.uint64)]
    sizes: list[NDArray[np.int32]] = [np.empty(0, dtype=np.int32)]
    sources: list[NDArray[np.int32]] = [np.empty(0, dtype=np.int32)]
    with open(path, "wb") as stream:
        for chunk in map_in_order(partial(_clean_chunk, rules=rules, seed=seed), _cut(records)):
            stream.writelines(chunk.lines)
            quarantine.write(chunk.quarantine)
            columns.append(chunk.columns)
            sizes.append(np.array([len(line) for line in chunk.lines], dtype=np.int32))
            sources.append(chunk.sources)
            for number, counts in chunk.counts.items():
                tallies[number].num_read += counts.num_read
                tallies[number].dropped.update(counts.dropped)
                tallies[number].quarantined.update(counts.quarantined)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes), dtype=np.int64)])
    table, source = np.concatenate(columns), np.concatenate(sources)
    del columns, sources
    places = np.arange(len(table), dtype=np.int64)
    for reason, dropped in find_duplicates(table[:, 0], table[:, 1]).items():
        for number, count in enumerate(np.bincount(source[dropped]).tolist()):
            if count:
                tallies[number].dropped[reason] += count
        places = np.setdiff1d(places, dropped, assume_unique=True)
    for number, count in enumerate(np.bincount(source[places]).tolist()):
        if count:
            tallies[number].num_kept += count
    return Pool(path, offsets, np.ascontiguousarray(table[:, 2:4]), np.ascontiguousarray(table[:, 4]), places)


def _cut(records: Iterable[Numbered]) -> Iterator[list[Numbered]]:
    records = iter(records)
    while chunk := list(itertools.islice(records, CHUNK_RECORDS)):
        yield chunk
