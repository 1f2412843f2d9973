"""Splits that share nothing: no sentence and no near-duplicate, of either side, lies in two of them.

Pairs are nodes; two pairs are joined when the normalised keys of their source sides, or of their target sides, are
equal. Held-out sets are made of whole connected groups, groups of one pair first, so that little is thrown away.
Guarantees: the choice depends on the seed and the set of pairs only, not on their order; sizes are exact; time is
near-linear. Refuses (CorpusError): a corpus too small for the sizes asked for.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cvm_translator.corpus.records import Pair
from cvm_translator.errors import CorpusError

Keys = NDArray[np.uint64]


def find_shared(keys: Keys, others: Keys) -> NDArray[np.bool_]:
    """Which pairs share the key of a side with any of the others: (N,)."""
    return np.isin(keys[:, 0], others[:, 0]) | np.isin(keys[:, 1], others[:, 1])


def compute_groups(keys: Keys) -> NDArray[np.int64]:
    """The group of each pair as the index of its first member: (N,)."""
    parents = np.arange(len(keys), dtype=np.int64)

    def find(node: int) -> int:
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = int(parents[node])
        return node

    shared: list[NDArray[np.int64]] = []
    for side in (0, 1):
        order = np.argsort(keys[:, side], kind="stable")
        is_same = keys[order[1:], side] == keys[order[:-1], side]
        shared += [order[:-1][is_same], order[1:][is_same]]
        for first, second in zip(shared[-2].tolist(), shared[-1].tolist(), strict=True):
            a, b = find(first), find(second)
            parents[max(a, b)] = min(a, b)
    for node in np.unique(np.concatenate(shared)).tolist():  # the others are groups of their own
        parents[node] = find(node)
    return parents


def draw(seed: int, pair: Pair) -> int:
    """A number that orders pairs at random, whatever order they came in."""
    text = f"{seed}\t{pair.source}\t{pair.target}"
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class HeldOut:
    """Places of pairs, rising."""

    sets: dict[str, NDArray[np.int64]]
    rest: NDArray[np.int64]
    """What stays for training."""
    num_left_over: int
    """Further members of groups of which a part was held out."""


def hold_out(keys: Keys, draws: NDArray[np.uint64], sizes: dict[str, int]) -> HeldOut:
    """Draw held-out sets of exact sizes from pairs with these keys (N, 2) and draws (N,)."""
    if not sizes:
        return HeldOut({}, np.arange(len(keys)), 0)
    group_of_pair, group_sizes = np.unique(compute_groups(keys), return_inverse=True, return_counts=True)[1:]
    members = np.lexsort((draws, group_of_pair))  # group after group, each in the order of the draws
    begins = np.concatenate([[0], np.cumsum(group_sizes)])
    # small groups first, by chance among equals; the largest one stays for training
    order = np.lexsort((draws[members[begins[:-1]]], group_sizes)) if len(group_sizes) else np.empty(0, dtype=np.int64)
    num_taken = 0
    num_left_over = 0
    sets: dict[str, NDArray[np.int64]] = {}
    for name, size in sizes.items():
        chosen: list[NDArray[np.int64]] = []
        room = size
        while room:
            if num_taken >= len(order) - 1:
                raise _too_small(sizes, len(keys), int(group_sizes[order[:-1]].sum()))
            group = members[begins[order[num_taken]] : begins[order[num_taken] + 1]]
            chosen.append(group[:room])
            num_left_over += len(group[room:])
            room -= len(chosen[-1])
            num_taken += 1
        sets[name] = np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
    is_rest = np.ones(len(keys), dtype=bool)
    for number in order[:num_taken].tolist():
        is_rest[members[begins[number] : begins[number + 1]]] = False
    return HeldOut(sets, np.flatnonzero(is_rest), num_left_over)


def _too_small(sizes: dict[str, int], num_pairs: int, num_usable: int) -> CorpusError:
    wanted = " and ".join(f"{name}_size {size}" for name, size in sizes.items())
    return CorpusError(
        f"corpus: {wanted} cannot be held out of {num_pairs} clean training pairs (at most {num_usable} in all can be, "
        "without near-duplicates in training): set smaller sizes, add text, or name validation and test sources"
    )


def choose_sample(draws: NDArray[np.uint64], size: int) -> NDArray[np.int64]:
    """Places of at most `size` pairs with these draws, rising."""
    return np.sort(np.argsort(draws, kind="stable")[:size])


def check_disjoint(splits: dict[str, Keys]) -> None:
    """Assert the promise of this module: no key of either side in two splits."""
    for (name, keys), (other, others) in itertools.combinations(splits.items(), 2):
        assert not find_shared(keys, others).any(), f"{name} and {other} share a sentence"
