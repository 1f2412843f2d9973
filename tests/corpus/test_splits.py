"""Splits: nothing shared on either side, exact sizes, independent of the order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvm_translator.corpus.records import Pair
from cvm_translator.corpus.splits import (
    check_disjoint,
    choose_sample,
    compute_groups,
    compute_keys,
    find_shared,
    hold_out,
    take,
)
from cvm_translator.corpus.text import make_key
from cvm_translator.errors import CorpusError

WORDS = st.integers(0, 12).map(lambda number: "abcdefghijklm"[number])
PAIRS = st.lists(st.tuples(WORDS, WORDS, st.sampled_from(["", "!", " 3", " %s"])), min_size=1, max_size=60)


def make_pairs(rows: list[tuple[str, str, str]]) -> list[Pair]:
    return [Pair(source + tail, target, f"t:{i}") for i, (source, target, tail) in enumerate(rows)]


def walk_group(pairs: list[Pair], start: int) -> set[int]:
    """Reference: the connected pairs, by repeated scanning."""
    found = {start}
    while True:
        sources, targets = ({make_key(pairs[i][side]) for i in found} for side in (0, 1))
        more = {i for i, p in enumerate(pairs) if make_key(p.source) in sources or make_key(p.target) in targets}
        if more == found:
            return found
        found = more


@settings(max_examples=60, deadline=None)
@given(rows=PAIRS)
def test_groups_equal_the_reference(rows: list[tuple[str, str, str]]) -> None:
    pairs = make_pairs(rows)
    groups = compute_groups(compute_keys(pairs))
    for index in range(len(pairs)):
        assert set(np.flatnonzero(groups == groups[index])) == walk_group(pairs, index)


@settings(max_examples=100, deadline=None)
@given(rows=PAIRS, sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)), seed=st.integers(0, 3))
def test_held_out_sets_share_nothing(rows: list[tuple[str, str, str]], sizes: tuple[int, int], seed: int) -> None:
    pairs = make_pairs(rows)
    wanted = {"validation": sizes[0], "test": sizes[1]}
    try:
        held_out, rest, left_over = hold_out(pairs, compute_keys(pairs), wanted, seed)
    except CorpusError as error:
        assert "cannot be held out" in str(error)
        return
    assert {name: len(indices) for name, indices in held_out.items()} == wanted
    assert rest
    everything = [*held_out["validation"], *held_out["test"], *rest, *left_over]
    assert sorted(everything) == list(range(len(pairs)))
    train = take(pairs, rest)
    splits = {name: take(pairs, indices) for name, indices in held_out.items()}
    for name, split in splits.items():
        for pair in split:
            for other in train:
                assert make_key(pair.source) != make_key(other.source), name
                assert make_key(pair.target) != make_key(other.target), name


def test_the_order_of_the_pairs_does_not_matter() -> None:
    pairs = make_pairs([(f"wort{chr(97 + i % 26)}{chr(97 + i // 26)}", f"word{i}", "") for i in range(200)])
    pairs = [Pair(p.source, p.source.replace("wort", "word"), p.origin) for p in pairs]
    chosen = []
    for order in (pairs, pairs[::-1]):
        held_out, _, _ = hold_out(order, compute_keys(order), {"test": 20}, seed=3)
        chosen.append({pair.source for pair in take(order, held_out["test"])})
    assert chosen[0] == chosen[1]
    other, _, _ = hold_out(pairs, compute_keys(pairs), {"test": 20}, seed=4)
    assert {pairs[i].source for i in other["test"]} != chosen[0]


def test_single_pairs_are_preferred() -> None:
    rows = [("a", "x", ""), ("a", "y", ""), ("b", "y", ""), ("c", "z", ""), ("d", "v", "")]
    held_out, rest, left_over = hold_out(make_pairs(rows), compute_keys(make_pairs(rows)), {"test": 2}, seed=0)
    assert held_out["test"] == [3, 4] and rest == [0, 1, 2] and left_over == []


def test_too_small_a_corpus_is_told_so() -> None:
    pairs = make_pairs([("a", "x", ""), ("b", "y", ""), ("c", "z", "")])
    with pytest.raises(CorpusError, match=r"validation_size 2 and test_size 2 .* 3 clean training pairs \(at most 2"):
        hold_out(pairs, compute_keys(pairs), {"validation": 2, "test": 2}, seed=0)


def test_sharing_across_lists() -> None:
    train, test = make_pairs([("Ein Haus", "a house", ""), ("b", "y", "")]), make_pairs([("ein HAUS", "q", "!")])
    assert find_shared(compute_keys(train), compute_keys(test)).tolist() == [True, False]
    with pytest.raises(AssertionError, match="share a sentence"):
        check_disjoint({"train": train, "test": test})


def test_samples_are_drawn_by_the_seed() -> None:
    pairs = make_pairs([(f"{i}a", "x", "") for i in range(50)])
    sample = choose_sample(pairs, 10, seed=1)
    assert len(sample) == 10 and sample == choose_sample(pairs, 10, seed=1) != choose_sample(pairs, 10, seed=2)
    assert choose_sample(pairs, 50, seed=1) == pairs
