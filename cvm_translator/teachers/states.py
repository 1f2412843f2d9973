"""What the frozen teacher says of every training pair, computed once and read back in each epoch.

`TeacherStates`: its last hidden states, D bfloat16 numbers a real target token; multiplied by the teacher's output
matrix in the loss they give its exact soft targets over the whole vocabulary, at any temperature, without a teacher
forward. Under bfloat16 autocast the online teacher rounds the same states to bfloat16 before that product, so nothing
is lost but the order of sums within a padded batch.

`TeacherTopTargets`: the k likeliest targets of each token with their log-probabilities at one temperature, in half
precision: a smaller file where k is well below D. What they leave of the distribution is lost.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.losses import TopTargets, compute_logits, find_top_targets
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.runs import atomic
from cvm_translator.teachers.rows import Autocast, Encode, RowFile

MASS_SAMPLE = 20_000
"""Tokens of which the mean mass is told."""


def describe_teacher(teacher: CvmTransformer, weights_sha256: str) -> str:
    """All that a teacher's answers depend on: its weights, and its sizes, heads and slots, which these do not tell."""
    return f"{weights_sha256} {atomic.sha256_json(teacher.config.model_dump(exclude_none=True))}"


class StoredTeacher(abc.ABC):
    """What of a teacher is in a file, there or not yet."""

    file: RowFile

    def make(self, teacher: CvmTransformer, autocast: Autocast, should_stop: Callable[[], None]) -> None:
        """Compute what is missing of the file (see `RowFile.make`)."""
        self.file.make(teacher, self._build_encoder(teacher), autocast, should_stop)

    @abc.abstractmethod
    def read(self, indices: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        """At the N real target tokens of the pairs, in the order of a flattened batch: tensors of N rows."""

    @abc.abstractmethod
    def describe(self) -> str:
        """What it is, for the log, once it is made."""

    @abc.abstractmethod
    def _build_encoder(self, teacher: CvmTransformer) -> Encode: ...


class TeacherStates(StoredTeacher):
    """Last hidden states."""

    def __init__(self, directory: Path, teacher: CvmTransformer, sha256: str, dataset: DistillationDataset) -> None:
        record = np.dtype((np.int16, (teacher.config.dim,)))
        self.file = RowFile(directory, "states", record, describe_teacher(teacher, sha256), dataset)

    def _build_encoder(self, teacher: CvmTransformer) -> Encode:
        return lambda hidden: hidden.to(torch.bfloat16).cpu().view(torch.int16).numpy()

    def gather(self, indices: NDArray[np.int64]) -> torch.Tensor:
        """(N, D) bfloat16: the states of the real target tokens of the pairs, in the order of a flattened batch."""
        return torch.from_numpy(self.file.gather(indices)).view(torch.bfloat16)

    def read(self, indices: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        return (self.gather(indices),)

    def describe(self) -> str:
        return "teacher states"


class TeacherTopTargets(StoredTeacher):
    """The k likeliest targets at a temperature."""

    def __init__(
        self,
        directory: Path,
        teacher: CvmTransformer,
        sha256: str,
        dataset: DistillationDataset,
        k: int,
        temperature: float,
        precision: str,
    ) -> None:
        """`precision` names what the teacher computes in: targets of another one are others."""
        self._k, self._temperature = min(k, teacher.vocab_size), temperature
        index = np.uint16 if teacher.vocab_size <= 1 << 16 else np.int32
        record = np.dtype([("indices", index, (self._k,)), ("log_probs", np.float16, (self._k,))])
        self._record = record
        kind = f"top-at-{temperature:g}-{precision}"
        self.file = RowFile(directory, kind, record, describe_teacher(teacher, sha256), dataset)

    def _build_encoder(self, teacher: CvmTransformer) -> Encode:
        matrix = teacher.embedding.matrix()

        def encode(hidden: torch.Tensor) -> NDArray[np.void]:
            top = find_top_targets(compute_logits(hidden, matrix), self._temperature, self._k)
            records = np.empty(len(hidden), dtype=self._record)
            records["indices"], records["log_probs"] = top.indices.cpu().numpy(), top.log_probs.cpu().numpy()
            return records

        return encode

    def gather(self, indices: NDArray[np.int64]) -> TopTargets:
        """Of the real target tokens of the pairs, in the order of a flattened batch."""
        records = self.file.gather(indices)
        return TopTargets(
            torch.from_numpy(records["indices"].astype(np.int64)), torch.from_numpy(records["log_probs"].copy())
        )

    def read(self, indices: NDArray[np.int64]) -> tuple[torch.Tensor, ...]:
        found = self.gather(indices)
        return found.indices, found.log_probs

    def describe(self) -> str:
        """With the share of the teacher's distribution that is kept, over tokens all over the corpus."""
        places = np.linspace(0, self.file.num_rows - 1, min(self.file.num_rows, MASS_SAMPLE)).astype(np.int64)
        mass = np.exp(self.file.rows["log_probs"][places].astype(np.float64)).sum(axis=1).mean()
        return (
            f"the teacher's {self._k} likeliest targets, {mass:.1%} of its mass at temperature {self._temperature:g},"
        )
