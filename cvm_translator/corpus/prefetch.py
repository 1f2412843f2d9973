"""The next batch, padded by another thread while the step that needs this one runs.

Guarantees: the schedule is only looked at, never moved ahead: its state is that of the batches handed out, and after a
change of stream, a rollback or a resume the batch that was made in vain is dropped. An exception of the thread is
raised where its batch is asked for.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from cvm_translator.corpus.batches import BatchSchedule
from cvm_translator.corpus.dataset import Batch, DistillationDataset


class BatchFeed:
    """Batches of a dataset in the order of a schedule, on a device."""

    def __init__(self, dataset: DistillationDataset, schedule: BatchSchedule, device: torch.device) -> None:
        self._dataset, self._schedule, self._device = dataset, schedule, device
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: tuple[NDArray[np.int64], Future[Batch]] | None = None

    def next(self) -> Batch:
        """The schedule's next batch."""
        indices = self._schedule.next()
        ahead, self._ahead = self._ahead, None
        future = ahead[1] if ahead is not None and np.array_equal(ahead[0], indices) else None
        batch = self._make(indices) if future is None else future.result()
        coming = self._schedule.peek()
        if coming is not None:
            self._ahead = coming, self._thread.submit(self._make, coming)
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _make(self, indices: NDArray[np.int64]) -> Batch:
        batch = self._dataset.batch(indices)
        if self._device.type == "cuda":
            return batch.pin_memory().to(self._device, non_blocking=True)
        return batch.to(self._device)
