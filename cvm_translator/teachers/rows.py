"""One record for each real target token of a dataset, computed by the frozen teacher once and read back by pair.

The file holds the records of sentence after sentence in the order of the dataset. Guarantees: it is keyed by the
teacher's weights and sizes, the token ids of every pair and what the records are; it has its name only when it is
whole, with its hash beside it, and is memory-mapped. A computation that was stopped or killed goes on where its last
saved batch was; of several runs that want the same file one computes and the others wait.
Not for data that changes between visits (noise, subword sampling, on-policy targets).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.corpus.tokenizer import PAD_ID
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.runs import atomic
from cvm_translator.runs.lock import waited_lock

_BATCH_SIZES = {"cpu": 64}
"""Sentences that the teacher reads together, by device type."""
_DEFAULT_BATCH_SIZE = 1024
SAVE_EVERY_BATCHES = 500

Encode = Callable[[torch.Tensor], NDArray[Any]]
"""The teacher's hidden states (N, D) at real targets in, N records out."""
Autocast = Callable[[], AbstractContextManager[Any]]


class RowFile:
    """The records of one teacher and dataset in a folder, there or not yet."""

    def __init__(
        self, directory: Path, kind: str, record: np.dtype[Any], teacher: str, dataset: DistillationDataset
    ) -> None:
        """`kind` tells what a record is, and is the end of the file's name; `record` is its type; `teacher` tells
        everything that its answers depend on."""
        words = f"{teacher} {dataset.sha256} {torch.__version__} {kind} {record}"
        self.path = directory / f"{hashlib.sha256(words.encode()).hexdigest()[:16]}.{kind}"
        self._dataset, self._record = dataset, record
        lengths = dataset.lengths[:, 1] + 1  # with the end mark
        self._offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    @property
    def num_rows(self) -> int:
        return int(self._offsets[-1])

    @property
    def num_bytes(self) -> int:
        """Size of the file, known before it is made."""
        return self.num_rows * self._record.itemsize

    @property
    def num_missing_bytes(self) -> int:
        """What the disk must still have room for."""
        if self.exists():
            return 0
        with contextlib.suppress(FileNotFoundError):
            return max(0, self.num_bytes - self._beside(".part").stat().st_blocks * 512)
        return self.num_bytes

    def exists(self) -> bool:
        """Whether a whole file is there; what is in it is only known to `is_intact`."""
        return self.path.exists() and self._manifest.exists() and self.path.stat().st_size == self.num_bytes

    def is_intact(self) -> bool:
        """Whether it is there and as it was written; reads all of it."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            return self.exists() and bool(atomic.read_json(self._manifest)["sha256"] == atomic.sha256_file(self.path))
        return False

    def make(
        self, teacher: CvmTransformer, encode: Encode, autocast: Autocast, should_stop: Callable[[], None]
    ) -> None:
        """Compute all records that are missing, each batch under `autocast()`; `should_stop` may raise before each, and
        while another process computes them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with waited_lock(self._beside(".lock"), should_stop):
            if not self.is_intact():
                self._make(teacher, encode, autocast, should_stop)

    def _make(
        self, teacher: CvmTransformer, encode: Encode, autocast: Autocast, should_stop: Callable[[], None]
    ) -> None:
        part, progress = self._beside(".part"), self._beside(".progress.json")
        batch_size = _BATCH_SIZES.get(teacher.positions.device.type, _DEFAULT_BATCH_SIZE)
        num_done = self._read_progress(part, progress, batch_size)
        if (
            not num_done
        ):  # a new file is as long as a finished one at once, so what was said of an old one must go first
            progress.unlink(missing_ok=True)
            atomic.fsync_directory(progress.parent)
        with open(part, "r+b" if num_done else "w+b") as stream:
            stream.truncate(self.num_bytes)
            try:
                for number, indices in enumerate(self._batches(batch_size)):
                    if number < num_done:
                        continue
                    should_stop()
                    self._compute(teacher, encode, autocast, stream, indices)
                    num_done = number + 1
                    if num_done % SAVE_EVERY_BATCHES == 0:
                        _save_progress(stream, progress, num_done, batch_size)
            finally:
                _save_progress(stream, progress, num_done, batch_size)
        atomic.write_json(self._manifest, {"sha256": atomic.sha256_file(part)})
        os.replace(part, self.path)
        atomic.fsync_directory(self.path.parent)
        progress.unlink()

    def _beside(self, end: str) -> Path:
        return self.path.with_name(self.path.name + end)

    @property
    def _manifest(self) -> Path:
        return self._beside(".json")

    def _read_progress(self, part: Path, progress: Path, batch_size: int) -> int:
        """Batches of this size that are safely in the unfinished file; none where they were of another size."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            if part.stat().st_size == self.num_bytes:
                done = atomic.read_json(progress)
                return int(done["num_batches"]) if done.get("batch_size", 64) == batch_size else 0
        return 0

    @cached_property
    def rows(self) -> NDArray[Any]:
        """All records."""
        return np.asarray(np.memmap(self.path, dtype=self._record, mode="r", shape=(self.num_rows,)))

    def gather(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """The records of the real target tokens of the pairs, in the order of a flattened batch."""
        counts = self._offsets[indices + 1] - self._offsets[indices]
        places = np.repeat(self._offsets[indices] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        return self.rows.take(places, axis=0)  # without the interpreter's lock: beside the step

    def _batches(self, batch_size: int) -> Iterator[NDArray[np.int64]]:
        """All pairs, those of like length together; always in the same order."""
        order = np.argsort(self._dataset.lengths.sum(axis=1), kind="stable")
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]

    @torch.inference_mode()
    def _compute(
        self,
        teacher: CvmTransformer,
        encode: Encode,
        autocast: Autocast,
        stream: BinaryIO,
        indices: NDArray[np.int64],
    ) -> None:
        """Write the records of some pairs, each to its own place."""
        batch = self._dataset.batch(indices).to(teacher.positions.device)
        teacher.eval()
        with autocast():
            hidden, _ = teacher(batch.src, batch.src_mask, batch.tgt_in)
            records = encode(hidden.flatten(0, 1)[(batch.tgt_out != PAD_ID).flatten()])
        first = 0
        for index in indices:
            count = int(self._offsets[index + 1] - self._offsets[index])
            stream.seek(int(self._offsets[index]) * self._record.itemsize)
            stream.write(records[first : first + count].tobytes())
            first += count


def _save_progress(stream: BinaryIO, progress: Path, num_batches: int, batch_size: int) -> None:
    """Say how many batches are in the file, once they are on the disk."""
    stream.flush()
    os.fsync(stream.fileno())
    atomic.write_json(progress, {"num_batches": num_batches, "batch_size": batch_size})
