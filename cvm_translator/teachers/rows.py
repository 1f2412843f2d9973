"""One record for each real target token of a dataset, computed by the frozen teacher once and read back by pair.

The file holds the records of sentence after sentence in the order of the dataset. Guarantees: it is keyed by the
teacher's weights, the token ids of every pair and what the records are, written whole or not at all, and memory-mapped.
Not for data that changes between visits (noise, subword sampling, on-policy targets).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
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

BUILD_BATCH_SIZE = 64

Encode = Callable[[torch.Tensor], NDArray[Any]]
"""The teacher's hidden states (N, D) at real targets in, N records out."""
Autocast = Callable[[], AbstractContextManager[Any]]


class RowFile:
    """The records of one teacher and dataset in a folder, there or not yet."""

    def __init__(
        self, directory: Path, kind: str, record: np.dtype[Any], teacher_sha256: str, dataset: DistillationDataset
    ) -> None:
        """`kind` tells what a record is, and is the end of the file's name; `record` is its type."""
        words = f"{teacher_sha256} {dataset.sha256} {torch.__version__} {kind} {record}"
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

    def exists(self) -> bool:
        return self.path.exists() and self.path.stat().st_size == self.num_bytes

    def make(
        self, teacher: CvmTransformer, encode: Encode, autocast: Autocast, should_stop: Callable[[], None]
    ) -> None:
        """Compute all records, each batch under `autocast()`; `should_stop` is called before each and may raise."""
        atomic.write_stream(self.path, lambda stream: self._compute(teacher, encode, autocast, should_stop, stream))

    @cached_property
    def rows(self) -> NDArray[Any]:
        """All records."""
        return np.asarray(np.memmap(self.path, dtype=self._record, mode="r", shape=(self.num_rows,)))

    def gather(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """The records of the real target tokens of the pairs, in the order of a flattened batch."""
        return np.concatenate([self.rows[self._offsets[i] : self._offsets[i + 1]] for i in indices])

    @torch.inference_mode()
    def _compute(
        self,
        teacher: CvmTransformer,
        encode: Encode,
        autocast: Autocast,
        should_stop: Callable[[], None],
        stream: BinaryIO,
    ) -> None:
        """Write the records batch by batch, sentences of like length together, each to its own place."""
        device = teacher.positions.device
        order = np.argsort(self._dataset.lengths.sum(axis=1), kind="stable")
        teacher.eval()
        for start in range(0, len(order), BUILD_BATCH_SIZE):
            should_stop()
            indices = order[start : start + BUILD_BATCH_SIZE]
            batch = self._dataset.batch(indices).to(device)
            with autocast():
                hidden, _ = teacher(batch.src, batch.src_mask, batch.tgt_in)
                records = encode(hidden.flatten(0, 1)[(batch.tgt_out != PAD_ID).flatten()])
            first = 0
            for index in indices:
                count = int(self._offsets[index + 1] - self._offsets[index])
                stream.seek(int(self._offsets[index]) * self._record.itemsize)
                stream.write(records[first : first + count].tobytes())
                first += count
