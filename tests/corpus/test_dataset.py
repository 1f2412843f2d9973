"""Batches as tensors: layout, padding, micro-batches."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.corpus.records import Pair
from cvm_translator.corpus.tokenizer import EOS_ID, PAD_ID

ROWS = st.lists(
    st.tuples(
        st.lists(st.integers(4, 99), min_size=1, max_size=9), st.lists(st.integers(4, 99), min_size=1, max_size=9)
    ),
    min_size=1,
    max_size=12,
)


def test_layout() -> None:
    data = DistillationDataset([[5, 6, 7], [8]], [[9], [10, 11]])
    batch = data.batch([1, 0])
    assert batch.src.tolist() == [[8, 2, 1, 1], [5, 6, 7, 2]]
    assert batch.src_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.tgt_in.tolist() == [[2, 10, 11], [2, 9, 1]]
    assert batch.tgt_out.tolist() == [[10, 11, 2], [9, 2, 1]]
    assert batch.num_tokens == 5 and len(batch) == 2 and batch.indices.tolist() == [1, 0]
    assert batch.src.dtype == torch.int64 and batch.src_mask.dtype == torch.bool


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, num_parts=st.integers(1, 14))
def test_micro_batches_hold_the_same_sentences(rows: list[tuple[list[int], list[int]]], num_parts: int) -> None:
    data = DistillationDataset([source for source, _ in rows], [target for _, target in rows])
    batch = data.batch(np.arange(len(rows)))
    parts = batch.split(num_parts)
    assert len(parts) == min(num_parts, len(rows))
    sizes = [len(part) for part in parts]
    assert sum(sizes) == len(rows) and max(sizes) - min(sizes) <= 1
    assert sum(part.num_tokens for part in parts) == batch.num_tokens == sum(len(target) + 1 for _, target in rows)
    begin = 0
    for part in parts:
        expected = data.batch(np.arange(begin, begin + len(part)))
        for name in ("src", "src_mask", "tgt_in", "tgt_out"):
            assert torch.equal(getattr(part, name), getattr(expected, name)) and getattr(part, name).is_contiguous()
        assert part.indices.tolist() == expected.indices.tolist()
        begin += len(part)
    assert (batch.tgt_out != PAD_ID).sum() == batch.num_tokens
    assert torch.equal(batch.src_mask, batch.src != PAD_ID)
    assert (batch.tgt_in[:, 0] == EOS_ID).all()


def test_long_pairs_are_dropped_and_counted() -> None:
    data = DistillationDataset([[4] * 7, [4] * 8, [4]], [[5], [5], [5] * 8], max_length=8)
    assert len(data) == 1 and data.num_dropped == 2 and data.kept.tolist() == [0]
    assert data.lengths.tolist() == [[7, 1]]
    assert data.batch([0]).src.shape == (1, 8)


def test_pairs_are_tokenised() -> None:
    class Letters:
        def encode(self, texts: list[str]) -> list[list[int]]:
            return [[ord(letter) for letter in text] for text in texts]

    data = DistillationDataset.from_pairs([Pair("ab", "c", "x:1"), Pair("d", "ef", "x:2")], Letters())  # type: ignore[arg-type]
    assert [side.tolist() for side in data[1]] == [[100], [101, 102]]
    assert data.lengths.tolist() == [[2, 1], [1, 2]]


def test_nothing_is_a_data_set_too() -> None:
    data = DistillationDataset([], [])
    assert len(data) == 0 and data.lengths.shape == (0, 2)


def test_sides_of_unequal_count_are_refused() -> None:
    with pytest.raises(ValueError, match="2 sources but 1 targets"):
        DistillationDataset([[4], [5]], [[6]])


def test_moving_keeps_everything() -> None:
    batch = DistillationDataset([[5, 6]], [[7]]).batch([0])
    moved = batch.to("cpu")
    assert torch.equal(moved.src, batch.src) and moved.num_tokens == batch.num_tokens
    assert moved.indices.tolist() == [0]


@pytest.mark.parametrize("num_parts", [1, 2])
def test_cutting_asks_no_device(num_parts: int) -> None:
    """Nothing can be read from the meta device."""
    data = DistillationDataset([[5, 6], [5], [7, 8, 9]], [[7], [8, 9], [4]])
    here = data.batch([0, 1, 2])
    parts = here.to("meta").split(num_parts)
    for part, expected in zip(parts, here.split(num_parts), strict=True):
        assert (part.num_tokens, part.num_source_tokens) == (expected.num_tokens, expected.num_source_tokens)
        assert part.src.shape == expected.src.shape and part.tgt_out.shape == expected.tgt_out.shape


def test_what_is_stored_is_cut_with_its_sentences() -> None:
    data = DistillationDataset([[5], [6], [7]], [[7], [8, 9], [4, 5, 6]])
    batch = dataclasses.replace(data.batch([2, 0, 1]), stored=(torch.arange(9), torch.arange(18).view(9, 2)))
    parts = batch.to("cpu").split(3)
    assert [part.stored[0].tolist() for part in parts] == [[0, 1, 2, 3], [4, 5], [6, 7, 8]]
    assert torch.equal(torch.cat([part.stored[1] for part in parts]), batch.stored[1])
