"""What the benchmarks of training train: the same weights and the same synthetic sentences for every system.

Lengths are those of Multi30k, and a target is about as long as its source, as translations are: whoever groups
sentences by the length of their sources groups their targets with them.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, fields, replace

import numpy as np

from benchmarks.common import BenchmarkError
from cvm_translator.config.model_presets import MODEL_PRESETS
from cvm_translator.config.schema import ModelConfig
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.models.initialization import init_random
from cvm_translator.models.transformer import CvmTransformer

MEAN_LENGTH, LENGTH_DEVIATION, SHORTEST, LONGEST = 15.0, 5.0, 3, 45
"""Pieces a source, as Multi30k has them with a vocabulary of 10,000."""
TARGET_DEVIATION = 3.0
"""Of a target's length from its source's."""
TEMPERATURE, ALPHA, BETA = 2.0, 0.8, 0.2


@dataclass(frozen=True)
class Problem:
    """What is trained, and for how long."""

    student: str
    teacher: str | None
    vocabulary: int
    batch_size: int
    num_steps: int
    num_warm_up: int
    num_pairs: int | None = None
    """Of the corpus; None: as many as the steps take."""

    def count_pairs(self) -> int:
        return self.num_pairs or self.batch_size * (self.num_steps + self.num_warm_up)


@dataclass
class Parts:
    """The same for every system."""

    problem: Problem
    student: CvmTransformer
    teacher: CvmTransformer | None
    dataset: DistillationDataset

    @classmethod
    def build(cls, problem: Problem) -> Parts:
        generator = np.random.default_rng(13)
        lengths = draw_lengths(generator, problem.count_pairs())
        sources, targets = ([generator.integers(4, problem.vocabulary, n).tolist() for n in side] for side in lengths.T)
        student = build_model(problem.student, problem.vocabulary, seed=1)
        teacher = build_model(problem.teacher, problem.vocabulary, seed=2) if problem.teacher else None
        return cls(problem, student, teacher, DistillationDataset(sources, targets))


def draw_lengths(generator: np.random.Generator, count: int) -> np.ndarray:
    """(count, 2) pieces of sources and targets."""
    sources = generator.normal(MEAN_LENGTH, LENGTH_DEVIATION, count)
    targets = sources + generator.normal(0.0, TARGET_DEVIATION, count)
    return np.stack([sources, targets], axis=1).clip(SHORTEST, LONGEST).astype(int)


def find_budget(lengths: np.ndarray, num_sentences: int) -> int:
    """Padded tokens a side of as many sentences on average; lengths (N, 2) without marks."""
    return round(num_sentences * float((lengths.max(axis=1) + 1).mean()))


def build_model(preset: str, vocabulary: int, seed: int) -> CvmTransformer:
    model = CvmTransformer(ModelConfig.model_validate(preset), vocabulary)
    init_random(model, seed)
    return model


class Stopwatch:
    """Real target tokens per second between the end of the warm-up and the last step."""

    def __init__(self, num_warm_up: int) -> None:
        self._num_warm_up = num_warm_up
        self._marks: list[tuple[float, int]] = []

    def mark(self, num_tokens_so_far: int) -> None:
        """After each step."""
        self._marks.append((time.perf_counter(), num_tokens_so_far))

    def rate(self) -> float:
        (begin, before), (end, after) = self._marks[self._num_warm_up - 1], self._marks[-1]
        return (after - before) / (end - begin)


def add_problem_options(parser: argparse.ArgumentParser) -> None:
    """The sizes of the problem, but for the teacher, which each program has its own default for."""
    parser.add_argument("--student", choices=MODEL_PRESETS, default="spec_student")
    parser.add_argument("--vocabulary", type=int, default=32_000, metavar="V")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N")
    parser.add_argument("--num-steps", type=int, default=20, metavar="N")
    parser.add_argument("--num-warm-up", type=int, default=3, metavar="N")
    parser.add_argument("--num-pairs", type=int, metavar="N", help="of the corpus; default: what the steps take")


def read_problem(options: argparse.Namespace) -> Problem:
    if options.num_warm_up < 1 or options.num_steps < 1:
        raise BenchmarkError("--num-steps and --num-warm-up are at least 1")
    problem = Problem(**{field.name: getattr(options, field.name) for field in fields(Problem)})
    least = replace(problem, num_pairs=None).count_pairs()
    if problem.count_pairs() < least:
        raise BenchmarkError(f"--num-pairs {problem.num_pairs}: these steps take {least}")
    return problem
