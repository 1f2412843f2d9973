"""Batches made ahead: the schedule's own order and state, whatever happens to the schedule in between."""

from __future__ import annotations

import threading
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


def test_the_next_batch_is_made_by_another_thread_and_its_error_arrives() -> None:
    threads: list[str] = []
    failing: list[bool] = []

    class Watched(DistillationDataset):
        def batch(self, indices: Sequence[int] | NDArray[np.int64]) -> Batch:
            threads.append(threading.current_thread().name)
            if failing:
                raise OSError("the disk is gone")
            return super().batch(indices)

    dataset = Watched([[5]] * 20, [[6]] * 20)
    with BatchFeed(dataset, BatchSchedule(dataset.lengths, 4, seed=3), torch.device("cpu")) as feed:
        for _ in range(3):
            feed.next()
    assert threads[0] == threading.current_thread().name
    assert len(threads) >= 3 and all(name.startswith("batches") for name in threads[1:])
    with BatchFeed(dataset, BatchSchedule(dataset.lengths, 4, seed=3), torch.device("cpu")) as feed:
        failing.append(True)
        with pytest.raises(OSError, match="the disk is gone"):
            feed.next()
