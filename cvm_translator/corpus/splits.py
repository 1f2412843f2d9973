"""Splits that share nothing: no sentence and no near-duplicate, of either side, lies in two of them.

Pairs are nodes; two pairs are joined when the normalised keys of their source sides, or of their target sides, are
equal. Held-out sets are made of whole connected groups, groups of one pair first, so that little is thrown away.
Guarantees: the choice depends on the seed and the set of pairs only, not on their order; sizes are exact; time is
near-linear. Refuses (CorpusError): a corpus too small for the sizes asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from cvm_translator.corpus.records import Pair
from cvm_translator.corpus.text import hash_key, make_key
from cvm_translator.errors import CorpusError

Keys = NDArray[np.uint64]


def compute_keys(pairs: list[Pair]) -> Keys:
    """Hashes of the near-duplicate keys of both sides, (N, 2)."""
    keys = np.empty((len(pairs), 2), dtype=np.uint64)
    for index, pair in enumerate(pairs):
        keys[index, 0] = hash_key(make_key(pair.source))
        keys[index, 1] = hash_key(make_key(pair.target))
    return keys


def find_shared(keys: Keys, others: Keys) -> NDArray[np.bool_]:
    """Which pairs share the key of a side with any of the others: (N,)."""
    return np.isin(keys[:, 0], others[:, 0]) | np.isin(keys[:, 1], others[:, 1])


def compute_groups(keys: Keys) -> NDArray[np.int64]:
    """The group of each pair as the index of its first member: (N,)."""
    parents = list(range(len(keys)))

    def find(node: int) -> int:
        while parents[node] != node:
            parents[node] = parents[parents[node]]
            node = parents[node]
        return node

    for side in (0, 1):
        first: dict[int, int] = {}
        for index, key in enumerate(keys[:, side].tolist()):
            other = first.setdefault(key, index)
            if other != index:
                a, b = find(index), find(other)
                if a != b:
                    parents[max(a, b)] = min(a, b)
    return np.array([find(index) for index in range(len(parents))], dtype=np.int64)


def _draw(seed: int, pair: Pair) -> int:
    """A number that orders pairs at random, whatever order they came in."""
    text = f"{seed}\t{pair.source}\t{pair.target}"
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "big")


def hold_out(
    pairs: list[Pair], keys: Keys, sizes: dict[str, int], seed: int
) -> tuple[dict[str, list[int]], list[int], list[int]]:
    """Draw held-out sets from `pairs`.

    Returns the indices of each set (exact sizes), of what stays for training, and of what is left over: the further
    members of a group of which a part was held out.
    """
    if not sizes:
        return {}, list(range(len(pairs))), []
    members: dict[int, list[int]] = {}
    for index, group in enumerate(compute_groups(keys).tolist()):
        members.setdefault(group, []).append(index)
    draws = [_draw(seed, pair) for pair in pairs]
    groups = sorted(members.values(), key=lambda group: (len(group), min(draws[index] for index in group)))

    chosen: dict[str, list[int]] = {name: [] for name in sizes}
    left_over: list[int] = []
    num_taken = 0
    for name, size in sizes.items():
        while len(chosen[name]) < size:
            if num_taken >= len(groups) - 1:  # the last, largest group stays for training
                raise _too_small(sizes, len(pairs), sum(map(len, groups[:-1])))
            group = sorted(groups[num_taken], key=lambda index: draws[index])
            room = size - len(chosen[name])
            chosen[name] += group[:room]
            left_over += group[room:]
            num_taken += 1
    rest = sorted(index for group in groups[num_taken:] for index in group)
    return {name: sorted(indices) for name, indices in chosen.items()}, rest, sorted(left_over)


def _too_small(sizes: dict[str, int], num_pairs: int, num_usable: int) -> CorpusError:
    wanted = " and ".join(f"{name}_size {size}" for name, size in sizes.items())
    return CorpusError(
        f"corpus: {wanted} cannot be held out of {num_pairs} clean training pairs (at most {num_usable} in all can be, "
        "without near-duplicates in training): set smaller sizes, add text, or name validation and test sources"
    )


def choose_sample(pairs: list[Pair], size: int, seed: int) -> list[Pair]:
    """At most `size` of the pairs, drawn by the seed, in their order."""
    if len(pairs) <= size:
        return pairs
    drawn = sorted(range(len(pairs)), key=lambda index: _draw(seed, pairs[index]))[:size]
    return [pairs[index] for index in sorted(drawn)]


def take(pairs: list[Pair], indices: Iterable[int]) -> list[Pair]:
    return [pairs[index] for index in indices]


def check_disjoint(splits: dict[str, list[Pair]]) -> None:
    """Assert the promise of this module: no key of either side in two splits."""
    for side in (0, 1):
        owner: dict[int, str] = {}
        for name, pairs in splits.items():
            for key in {hash_key(make_key(pair[side])) for pair in pairs}:
                assert owner.setdefault(key, name) == name, f"{name} and {owner[key]} share a sentence"
