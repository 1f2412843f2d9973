"""Batches made ahead: the schedule's own order and state, whatever happens to the schedule in between."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cvm_translator.corpus.batches import BatchSchedule
from cvm_translator.corpus.dataset import Batch, DistillationDataset
from cvm_translator.corpus.prefetch import BatchFeed


def make_dataset() -> DistillationDataset:
    return DistillationDataset([[5 + i % 7] * (1 + i % 5) for i in range(43)], [[6] * (1 + i % 3) for i in range(43)])


def make_schedule(dataset: DistillationDataset) -> BatchSchedule:
    return BatchSchedule(dataset.lengths, 4, seed=3)


def test_batches_and_state_are_those_of_the_schedule_alone() -> None:
    dataset = make_dataset()
    alone, fed = make_schedule(dataset), make_schedule(dataset)
    with BatchFeed(dataset, fed, torch.device("cpu")) as feed:
        for number in range(25):  # over the ends of epochs
            if number == 7:
                for schedule in (alone, fed):
                    schedule.change_stream(2)
            if number == 16:
                state = {**alone.state_dict(), "epoch": 0, "cursor": 1}
                for schedule in (alone, fed):
                    schedule.load_state_dict(state)
            expected, batch = dataset.batch(alone.next()), feed.next()
            assert batch.indices.tolist() == expected.indices.tolist()
            assert torch.equal(batch.src, expected.src) and torch.equal(batch.tgt_out, expected.tgt_out)
            assert fed.state_dict() == alone.state_dict()


class Watched(DistillationDataset):
    """Remembers who makes each batch; fails from the batch number `fails_from` on."""

    fails_from = 1_000

    def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
        self.threads.append(threading.current_thread().name)
        if len(self.threads) >= self.fails_from:
            raise OSError("the disk is gone")
        return super().batch(indices)

    @functools.cached_property
    def threads(self) -> list[str]:
        return []


def test_the_next_batch_is_made_by_another_thread_and_its_error_arrives() -> None:
    dataset = Watched([[5]] * 20, [[6]] * 20)
    dataset.fails_from = 3
    with BatchFeed(dataset, BatchSchedule(dataset.lengths, 4, seed=3), torch.device("cpu")) as feed:
        feed.next()
        feed.next()
        with pytest.raises(OSError, match="the disk is gone"):
            feed.next()
    assert dataset.threads[0] == threading.current_thread().name
    assert all(name.startswith("batches") for name in dataset.threads[1:3])


def test_an_error_of_a_batch_that_nobody_asks_for_is_dropped() -> None:
    dataset = Watched([[5]] * 20, [[6]] * 20)
    schedule = BatchSchedule(dataset.lengths, 4, seed=3)
    dataset.fails_from = 2
    with BatchFeed(dataset, schedule, torch.device("cpu")) as feed:
        feed.next()
        while len(dataset.threads) < 2:  # the second is on its way
            time.sleep(0.001)
        dataset.fails_from = 1_000
        schedule.change_stream(4)
        assert feed.next().indices.tolist() == BatchSchedule(dataset.lengths, 4, seed=3, stream=4).next().tolist()
