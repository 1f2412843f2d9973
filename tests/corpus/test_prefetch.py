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


def test_what_is_stored_of_the_teacher_is_read_ahead_by_the_other_thread() -> None:
    dataset, threads = make_dataset(), list[str]()

    def read(indices: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        threads.append(threading.current_thread().name)
        return (torch.from_numpy(indices.repeat(2)),)

    with BatchFeed(dataset, make_schedule(dataset), torch.device("cpu"), read) as feed:
        for _ in range(5):
            batch = feed.next()
            assert batch.stored[0].tolist() == batch.indices.repeat(2).tolist()
    assert all(name.startswith("batches") for name in threads[1:]) and len(threads) >= 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_arrive_whole_on_a_cuda_device() -> None:
    dataset, device = make_dataset(), torch.device("cuda")
    alone, fed = make_schedule(dataset), make_schedule(dataset)
    with BatchFeed(dataset, fed, device, lambda indices: (torch.from_numpy(indices),)) as feed:
        for _ in range(25):
            expected, batch = dataset.batch(alone.next()), feed.next()
            torch.cuda._sleep(1_000_000)  # a step that is still running when the next copy begins
            assert torch.equal(batch.src.cpu(), expected.src) and torch.equal(batch.tgt_out.cpu(), expected.tgt_out)
            assert batch.stored[0].tolist() == expected.indices.tolist()
