"""The order of batches: exact sizes, every sentence once an epoch, resumable."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvm_translator.corpus.batches import BatchSchedule


def make_lengths(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 60, size=(count, 2))


def draw(schedule: BatchSchedule, count: int) -> list[list[int]]:
    return [schedule.next().tolist() for _ in range(count)]


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 300), batch_size=st.integers(1, 40))
def test_an_epoch_shows_every_sentence_at_most_once(count: int, batch_size: int) -> None:
    schedule = BatchSchedule(make_lengths(count), batch_size, seed=1)
    batches = draw(schedule, schedule.num_batches_per_epoch)
    assert schedule.epoch == 0
    seen = [index for batch in batches for index in batch]
    assert len(seen) == len(set(seen))
    if count < batch_size:
        assert sorted(seen) == list(range(count))
    else:
        assert all(len(batch) == batch_size for batch in batches)
        assert count - len(seen) < batch_size
    schedule.next()
    assert schedule.epoch == 1


@settings(max_examples=40, deadline=None)
@given(before=st.integers(0, 40), stream=st.integers(0, 3))
def test_resume_is_exact(before: int, stream: int) -> None:
    lengths = make_lengths(100)
    schedule = BatchSchedule(lengths, 8, seed=5)
    draw(schedule, 3)
    schedule.change_stream(stream)
    draw(schedule, before)
    state = json.loads(json.dumps(schedule.state_dict()))
    resumed = BatchSchedule(lengths, 8, seed=99)
    resumed.load_state_dict(state)
    assert draw(resumed, 30) == draw(schedule, 30)
    assert resumed.state_dict() == schedule.state_dict()


def test_streams_epochs_and_seeds_differ() -> None:
    lengths = make_lengths(200)
    runs = [draw(BatchSchedule(lengths, 10, seed, stream), 40) for seed, stream in ((1, 0), (1, 1), (2, 0))]
    assert runs[0] != runs[1] != runs[2] != runs[0]
    assert runs[0][:20] != runs[0][20:]
    assert draw(BatchSchedule(lengths, 10, 1), 40) == runs[0]


def test_batches_are_bucketed_by_length() -> None:
    lengths = make_lengths(5000)
    schedule = BatchSchedule(lengths, 50, seed=3)
    spreads = [np.ptp(lengths[schedule.next()].max(axis=1)) for _ in range(50)]
    assert np.mean(spreads) < 5  # of 60
    longest = [int(lengths[schedule.next()].max()) for _ in range(30)]
    assert longest != sorted(longest)


def test_a_position_of_another_corpus_is_refused() -> None:
    state = BatchSchedule(make_lengths(100), 8, seed=5).state_dict()
    with pytest.raises(ValueError, match="num_sentences 100, now it is 99"):
        BatchSchedule(make_lengths(99), 8, seed=5).load_state_dict(state)
    with pytest.raises(ValueError, match="batch_size 8, now it is 4"):
        BatchSchedule(make_lengths(100), 4, seed=5).load_state_dict(state)
    with pytest.raises(ValueError, match="outside an epoch"):
        BatchSchedule(make_lengths(100), 8, seed=5).load_state_dict({**state, "cursor": 13})


def test_no_sentences_no_schedule() -> None:
    with pytest.raises(ValueError, match="from 0 sentences"):
        BatchSchedule(make_lengths(0), 8, seed=5)
