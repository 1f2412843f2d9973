"""The order of batches: exact sizes, every sentence once an epoch, resumable."""

from __future__ import annotations

import hashlib
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


def test_batches_are_bucketed_by_length_and_the_buckets_shuffled() -> None:
    lengths = make_lengths(5000)
    schedule = BatchSchedule(lengths, 50, seed=3)
    spreads = [np.ptp(lengths[schedule.next()].max(axis=1)) for _ in range(50)]
    assert np.mean(spreads) < 15  # of 60, though the sides have nothing to do with each other
    longest = [int(lengths[schedule.next()].max()) for _ in range(30)]
    assert longest != sorted(longest)


def test_the_order_stays_what_it_was() -> None:
    """A run that was begun with an older version sees the same sentences at the same steps."""
    schedule = BatchSchedule(make_lengths(1000), 8, seed=5, stream=1)
    drawn = [index for _ in range(300) for index in schedule.next().tolist()]
    assert hashlib.sha256(np.array(drawn, dtype=np.int64).tobytes()).hexdigest()[:16] == "8c8204ee6f28c45e"
    assert set(schedule.state_dict()) == {"seed", "stream", "epoch", "cursor", "num_sentences", "batch_size"}


def make_text_lengths(count: int) -> np.ndarray:
    """Sources of many lengths, mostly short, and targets that are about as long."""
    generator = np.random.default_rng(4)
    sources = np.clip(generator.lognormal(2.3, 0.9, count), 1, 95)
    return np.stack([sources, np.clip(sources * generator.normal(0.95, 0.2, count), 1, 95)], axis=1).astype(np.int64)


@pytest.mark.parametrize(
    ("size", "least"), [({"batch_size": 32}, 0.8), ({"batch_size": 32, "batch_tokens": 512}, 0.95)]
)
def test_little_is_padding(size: dict[str, int], least: float) -> None:
    schedule = BatchSchedule(make_text_lengths(40_000), seed=3, **size)
    assert schedule.padding_efficiency() > least
    padded = real = 0
    for _ in range(schedule.num_batches_per_epoch):
        ends = schedule._lengths[schedule.next()]
        padded, real = padded + int((ends.max(axis=0) * len(ends)).sum()), real + int(ends.sum())
    assert schedule.padding_efficiency() == pytest.approx(real / padded)


def test_the_padding_of_many_batches_is_told_from_some(monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = BatchSchedule(make_text_lengths(40_000), 32, seed=3)
    exact = schedule.padding_efficiency()
    monkeypatch.setattr("cvm_translator.corpus.batches.PADDING_SAMPLE", 100)
    lengths, seen = schedule._lengths, []

    class Watched:
        def __getitem__(self, batch: np.ndarray) -> np.ndarray:
            seen.append(int(batch[0]))
            return lengths[batch]

    schedule._lengths = Watched()  # type: ignore[assignment]
    sampled = schedule.padding_efficiency()
    assert sampled == pytest.approx(exact, abs=0.02) and sampled == schedule.padding_efficiency()
    assert 50 < len(set(seen)) <= 100


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 300), batch_tokens=st.integers(1, 400))
def test_a_token_budget_is_kept_and_every_sentence_is_seen(count: int, batch_tokens: int) -> None:
    lengths = make_lengths(count)
    schedule = BatchSchedule(lengths, 1, seed=1, batch_tokens=batch_tokens)
    for epoch in range(2):
        batches = draw(schedule, schedule.num_batches_per_epoch)
        assert schedule.epoch == epoch
        assert sorted(index for batch in batches for index in batch) == list(range(count))
        for batch in batches:
            assert len(batch) == 1 or (lengths[batch].max() + 1) * len(batch) <= batch_tokens
        if epoch == 0:
            first_of_next = schedule.next()
            schedule.load_state_dict(schedule.state_dict() | {"cursor": 0})
            assert np.array_equal(schedule.next(), first_of_next)
            schedule.load_state_dict(schedule.state_dict() | {"cursor": 0})


def test_a_budget_is_filled() -> None:
    lengths = make_text_lengths(5000)
    schedule = BatchSchedule(lengths, 1, seed=2, batch_tokens=512)
    sizes = [int((lengths[batch].max() + 1) * len(batch)) for batch in draw(schedule, 100)]
    assert np.mean(sizes) > 0.9 * 512


def test_a_position_of_another_corpus_is_refused() -> None:
    state = BatchSchedule(make_lengths(100), 8, seed=5).state_dict()
    with pytest.raises(ValueError, match="num_sentences 100, now it is 99"):
        BatchSchedule(make_lengths(99), 8, seed=5).load_state_dict(state)
    with pytest.raises(ValueError, match="order 2, now it is None"):
        BatchSchedule(make_lengths(100), 8, seed=5).load_state_dict({**state, "order": 2})
    with pytest.raises(ValueError, match="batch_size 8, now it is None"):
        BatchSchedule(make_lengths(100), 8, seed=5, batch_tokens=64).load_state_dict(state)
    with pytest.raises(ValueError, match="batch_size 8, now it is 4"):
        BatchSchedule(make_lengths(100), 4, seed=5).load_state_dict(state)
    with pytest.raises(ValueError, match="outside an epoch"):
        BatchSchedule(make_lengths(100), 8, seed=5).load_state_dict({**state, "cursor": 13})


def test_no_sentences_no_schedule() -> None:
    with pytest.raises(ValueError, match="from 0 sentences"):
        BatchSchedule(make_lengths(0), 8, seed=5)
