"""Splits: nothing shared on either side, exact sizes, independent of the order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvm_translator.corpus.records import Pair
from cvm_translator.corpus.splits import (
    HeldOut,
    check_disjoint,
    choose_sample,
    compute_groups,
    draw,
    find_shared,
    hold_out,
)
from cvm_translator.corpus.text import make_key
from cvm_translator.errors import CorpusError

from .conftest import compute_keys

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


def draw_sets(pairs: list[Pair], sizes: dict[str, int], seed: int) -> HeldOut:
    draws = np.array([draw(seed, pair) for pair in pairs], dtype=np.uint64)
    return hold_out(compute_keys(pairs), draws, sizes)


@settings(max_examples=100, deadline=None)
@given(rows=PAIRS, sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)), seed=st.integers(0, 3))
def test_held_out_sets_share_nothing(rows: list[tuple[str, str, str]], sizes: tuple[int, int], seed: int) -> None:
    pairs = make_pairs(rows)
    wanted = {"validation": sizes[0], "test": sizes[1]}
    try:
        held_out = draw_sets(pairs, wanted, seed)
    except CorpusError as error:
        assert "cannot be held out" in str(error)
        return
    assert {name: len(places) for name, places in held_out.sets.items()} == wanted
    assert len(held_out.rest)
    everything = [*held_out.sets["validation"], *held_out.sets["test"], *held_out.rest]
    assert len(set(everything)) == len(everything) == len(pairs) - held_out.num_left_over
    for name, places in held_out.sets.items():
        for pair in (pairs[place] for place in places):
            for other in (pairs[place] for place in held_out.rest):
                assert make_key(pair.source) != make_key(other.source), name
                assert make_key(pair.target) != make_key(other.target), name


def test_the_order_of_the_pairs_does_not_matter() -> None:
    pairs = make_pairs([(f"wort{chr(97 + i % 26)}{chr(97 + i // 26)}", f"word{i}", "") for i in range(200)])
    pairs = [Pair(p.source, p.source.replace("wort", "word"), p.origin) for p in pairs]
    chosen = []
    for order in (pairs, pairs[::-1]):
        held_out = draw_sets(order, {"test": 20}, seed=3)
        chosen.append({order[place].source for place in held_out.sets["test"]})
    assert chosen[0] == chosen[1]
    other = draw_sets(pairs, {"test": 20}, seed=4)
    assert {pairs[i].source for i in other.sets["test"]} != chosen[0]


def test_single_pairs_are_preferred() -> None:
    rows = [("a", "x", ""), ("a", "y", ""), ("b", "y", ""), ("c", "z", ""), ("d", "v", "")]
    held_out = draw_sets(make_pairs(rows), {"test": 2}, seed=0)
    assert held_out.sets["test"].tolist() == [3, 4] and held_out.rest.tolist() == [0, 1, 2]
    assert held_out.num_left_over == 0


def test_members_of_a_group_that_is_held_out_in_part_are_left_over() -> None:
    rows = [("a", "x", ""), ("a", "y", ""), ("b", "v", ""), ("b", "w", ""), ("b", "u", "")]
    held_out = draw_sets(make_pairs(rows), {"test": 1}, seed=0)
    assert held_out.sets["test"].tolist() in ([0], [1]) and held_out.rest.tolist() == [2, 3, 4]
    assert held_out.num_left_over == 1


def test_too_small_a_corpus_is_told_so() -> None:
    pairs = make_pairs([("a", "x", ""), ("b", "y", ""), ("c", "z", "")])
    with pytest.raises(CorpusError, match=r"validation_size 2 and test_size 2 .* 3 clean training pairs \(at most 2"):
        draw_sets(pairs, {"validation": 2, "test": 2}, seed=0)


def test_sharing_across_lists() -> None:
    train, test = make_pairs([("Ein Haus", "a house", ""), ("b", "y", "")]), make_pairs([("ein HAUS", "q", "!")])
    assert find_shared(compute_keys(train), compute_keys(test)).tolist() == [True, False]
    with pytest.raises(AssertionError, match="share a sentence"):
        check_disjoint({"train": compute_keys(train), "test": compute_keys(test)})


def test_samples_go_by_the_draws() -> None:
    draws = np.array([30, 10, 20, 40], dtype=np.uint64)
    assert choose_sample(draws, 2).tolist() == [1, 2]
    assert choose_sample(draws, 9).tolist() == [0, 1, 2, 3]
