"""The next batch, made by another thread while the step that needs this one runs.

Guarantees: the schedule is only looked at, never moved ahead: its state is that of the batches handed out, and after a
change of stream, a rollback or a resume the batch that was made in vain is dropped. An exception of the thread is
raised where its batch is asked for. On CUDA the copy runs beside the step, on a stream of its own, and the step's
stream waits for it, not the program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from cvm_translator.corpus.batches import BatchSchedule
from cvm_translator.corpus.dataset import Batch, DistillationDataset

ReadStored = Callable[[NDArray[np.int64]], tuple[torch.Tensor, ...]]
"""Places of pairs in, what is stored of the teacher at their real target tokens out (see `Batch.stored`)."""


class _Made(NamedTuple):
    batch: Batch
    copied: torch.cuda.Event | None
    """Happens when the batch is on the device, where that is not yet certain."""


class BatchFeed:
    """Batches of a dataset in the order of a schedule, on a device, with what `read` finds stored for them."""

    def __init__(
        self,
        dataset: DistillationDataset,
        schedule: BatchSchedule,
        device: torch.device,
        read: ReadStored | None = None,
    ) -> None:
        self._dataset, self._schedule, self._device, self._read = dataset, schedule, device, read
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: tuple[NDArray[np.int64], Future[_Made]] | None = None

    def next(self) -> Batch:
        """The schedule's next batch."""
        indices = self._schedule.next()
        ahead, self._ahead = self._ahead, None
        future = ahead[1] if ahead is not None and np.array_equal(ahead[0], indices) else None
        made = self._make(indices) if future is None else future.result()
        coming = self._schedule.peek()
        if coming is not None:
            self._ahead = coming, self._thread.submit(self._make, coming)
        if made.copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(made.copied)
            for tensor in made.batch.tensors:  # their memory is not given to another batch before this stream is done
                tensor.record_stream(stream)
        return made.batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _make(self, indices: NDArray[np.int64]) -> _Made:
        batch = self._dataset.batch(indices)
        if self._read is not None:
            batch = dataclasses.replace(batch, stored=self._read(indices))
        if self._stream is None:
            return _Made(batch.to(self._device), None)
        with torch.cuda.stream(self._stream):
            moved = batch.pin_memory().to(self._device, non_blocking=True)
            return _Made(moved, self._stream.record_event())
