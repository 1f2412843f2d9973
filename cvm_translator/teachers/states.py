"""The frozen teacher's last hidden states of every training pair, computed once and read back in each epoch.

The file holds one row of D bfloat16 numbers a real target token, sentence after sentence in the order of the dataset;
multiplied by the teacher's output matrix in the loss they give its exact soft targets over the whole vocabulary, at any
temperature, without a teacher forward. Under bfloat16 autocast the online teacher rounds the same states to bfloat16
before that product, so nothing is lost but the order of sums within a padded batch.

Guarantees: the file is keyed by the teacher's weights and the token ids of every pair, written whole or not at all, and
memory-mapped. Not for data that changes between visits (noise, subword sampling, on-policy targets).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray

from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.corpus.tokenizer import PAD_ID
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.runs import atomic

BUILD_BATCH_SIZE = 64
BYTES_PER_NUMBER = 2


def compute_states_bytes(dataset: DistillationDataset, dim: int) -> int:
    """Size of the file, known before it is made."""
    return int((dataset.lengths[:, 1] + 1).sum()) * dim * BYTES_PER_NUMBER


def _states_path(teacher_sha256: str, dataset: DistillationDataset, directory: Path) -> Path:
    key = hashlib.sha256(f"{teacher_sha256} {dataset.sha256} {torch.__version__}".encode()).hexdigest()[:16]
    return directory / f"states-{key}.bf16"


def has_states(teacher_sha256: str, dataset: DistillationDataset, dim: int, directory: Path) -> bool:
    """Whether the file is there already."""
    path = _states_path(teacher_sha256, dataset, directory)
    return path.exists() and path.stat().st_size == compute_states_bytes(dataset, dim)


class TeacherStates:
    """Reads the states of chosen pairs."""

    def __init__(self, path: Path, offsets: NDArray[np.int64], dim: int) -> None:
        self._offsets = offsets
        self._rows = np.memmap(path, dtype=np.int16, mode="r", shape=(int(offsets[-1]), dim))

    def gather(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """(N, D) bfloat16: the states of the real target tokens of the pairs, in the order of a flattened batch."""
        rows = [self._rows[self._offsets[i] : self._offsets[i + 1]] for i in indices]
        return torch.from_numpy(np.concatenate(rows)).view(torch.bfloat16)


def obtain_states(
    teacher: CvmTransformer,
    teacher_sha256: str,
    dataset: DistillationDataset,
    directory: Path,
    should_stop: Callable[[], None],
) -> tuple[TeacherStates, bool]:
    """Open the states of this teacher and dataset, computing them first if need be; also tells whether they were there.

    `should_stop` is called between batches and may raise to leave; nothing half-made stays.
    """
    lengths = dataset.lengths[:, 1] + 1  # with the end mark
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    dim = teacher.config.dim
    path = _states_path(teacher_sha256, dataset, directory)
    is_there = has_states(teacher_sha256, dataset, dim, directory)
    if not is_there:
        atomic.write_stream(path, lambda stream: _compute(teacher, dataset, offsets, stream, should_stop))
    return TeacherStates(path, offsets, dim), is_there


@torch.inference_mode()
def _compute(
    teacher: CvmTransformer,
    dataset: DistillationDataset,
    offsets: NDArray[np.int64],
    stream: BinaryIO,
    should_stop: Callable[[], None],
) -> None:
    """Write the states batch by batch, sentences of like length together, each to its own place."""
    device, row_bytes = teacher.positions.device, teacher.config.dim * BYTES_PER_NUMBER
    order = np.argsort(dataset.lengths.sum(axis=1), kind="stable")
    teacher.eval()
    for start in range(0, len(order), BUILD_BATCH_SIZE):
        should_stop()
        indices = order[start : start + BUILD_BATCH_SIZE]
        batch = dataset.batch(indices).to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            hidden, _ = teacher(batch.src, batch.src_mask, batch.tgt_in)
        real = (batch.tgt_out != PAD_ID).flatten()
        states = hidden.flatten(0, 1)[real].to(torch.bfloat16).cpu().view(torch.int16).numpy()
        first = 0
        for index in indices:
            count = int(offsets[index + 1] - offsets[index])
            stream.seek(int(offsets[index]) * row_bytes)
            stream.write(states[first : first + count].tobytes())
            first += count
