"""Checks before the first step: what would waste hours is found in seconds.

Guarantees: what makes a run pointless or dishonest (misaligned files, leaking splits, no room on disk) raises, naming
where and what to do; what may be meant that way (a poor teacher, a lopsided loss) comes back as a warning record.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
import shutil
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cvm_translator.corpus.parallel import map_in_order
from cvm_translator.corpus.records import Pair
from cvm_translator.corpus.text import hash_key, make_key
from cvm_translator.errors import CorpusError, NoRoomError
from cvm_translator.metrics.base import FloatArray
from cvm_translator.metrics.bertscore import derangement
from cvm_translator.metrics.placeholders import PLACEHOLDER

MAX_OFFSET = 5
BLOCK_PAIRS = 100
MAX_CHECKED_BLOCKS = 1000
MAX_SAMPLED_PAIRS = 100_000
MIN_PAIRS_TO_TELL = 60
MIN_SHIFT_DEVIATIONS = 4.0
MIN_PAIRS_FOR_RANDOM = 200
MIN_RANDOM_DEVIATIONS = 3.0
MIN_LENGTH_SPREAD = 0.3  # of log lengths; where all texts are equally long, length says nothing
MIN_TEACHER_BLEU = 10.0
MAX_SIZE_RATIO = 10.0
MIN_GRADIENT_RATIO = 0.2
LEAKAGE_CHUNK_PAIRS = 10_000


@dataclass(frozen=True)
class PreflightWarning:
    """Something the user should know, and may have meant."""

    code: str
    message: str


# ------------------------------------------------------------------------------------------------------- alignment


@functools.cache
def _combining_marks() -> re.Pattern[str]:
    return re.compile(f"[{''.join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.combining(c))}]+")


def find_anchors(text: str) -> frozenset[str]:
    """What a text has in common with its translation: numbers, placeholders, related words and names."""
    placeholders = PLACEHOLDER.findall(text)
    plain = unicodedata.normalize("NFKD", PLACEHOLDER.sub(" ", text)).casefold()
    if not plain.isascii():
        plain = _combining_marks().sub("", plain)
    words = re.findall(r"[^\W\d_]{4,}", plain)
    return frozenset([*placeholders, *re.findall(r"\d+", plain), *(word[:4] for word in words)])


def _length(text: str) -> float:
    return math.log(len(text) + 3.0)


class _Pairs:
    """Likeness of source i and target j: shared anchors and like length, 0..1. Texts are read when they are needed."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self._pairs = pairs
        self._known: dict[tuple[int, int], tuple[float, frozenset[str]]] = {}
        self.sample = np.unique(np.linspace(0, len(pairs) - 1, min(len(pairs), MAX_SAMPLED_PAIRS)).astype(np.int64))
        """Places of pairs all over the corpus."""
        lengths = [
            (_length(pair.source), _length(pair.target)) for pair in map(pairs.__getitem__, self.sample.tolist())
        ]
        self.source_lengths, self.target_lengths = np.array(lengths).T
        self.usual_ratio = float(np.median(self.target_lengths - self.source_lengths))

    def _look_at(self, side: int, index: int) -> tuple[float, frozenset[str]]:
        """Length and anchors of one text."""
        if (side, index) not in self._known:
            text = self._pairs[index][side]
            self._known[side, index] = _length(text), find_anchors(text)
        return self._known[side, index]

    def forget(self) -> None:
        """The texts read so far."""
        self._known.clear()

    def likeness(self, rows: np.ndarray, columns: np.ndarray) -> FloatArray:
        differences, shared = [], []
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            (source_length, mine), (target_length, theirs) = self._look_at(0, row), self._look_at(1, column)
            differences.append(target_length - source_length - self.usual_ratio)
            shared.append(len(mine & theirs) / max(1, min(len(mine), len(theirs))))
        return np.asarray(0.5 * np.exp(-2.0 * np.abs(differences)) + 0.5 * np.asarray(shared), dtype=np.float64)


def _deviations(differences: FloatArray) -> float:
    """How many standard errors the mean lies above 0."""
    error = differences.std() / math.sqrt(len(differences))
    return float(differences.mean() / error) if error > 0 else 0.0


def _find_shift(pairs: _Pairs, start: int, stop: int, total: int) -> int:
    """The offset at which the block's sources fit the targets certainly better than in place; 0 if none."""
    rows = np.arange(start, stop)
    in_place = pairs.likeness(rows, rows)
    best_offset, best_gain = 0, 0.0
    for offset in [*range(-MAX_OFFSET, 0), *range(1, MAX_OFFSET + 1)]:
        inside = (rows + offset >= 0) & (rows + offset < total)
        if inside.sum() < MIN_PAIRS_TO_TELL // 2:
            continue
        gains = pairs.likeness(rows[inside], rows[inside] + offset) - in_place[inside]
        if _deviations(gains) > MIN_SHIFT_DEVIATIONS and gains.mean() > best_gain:
            best_offset, best_gain = offset, float(gains.mean())
    return best_offset


def check_alignment(corpus: Sequence[Pair], name: str = "corpus.train") -> None:
    """Refuse a corpus whose targets belong to other sources, in all of it or in a stretch.

    Blocks of pairs are compared with their neighbourhood: a block that fits better at an offset is shifted. A corpus in
    no order has no offsets; there, pairs must at least be more alike than random ones. Too little to tell (fewer than
    60 pairs; for the second check fewer than 200, or texts all equally long) passes.
    """
    total = len(corpus)
    if total < MIN_PAIRS_TO_TELL:
        return
    pairs = _Pairs(corpus)
    starts = list(range(0, max(1, total - BLOCK_PAIRS // 2), BLOCK_PAIRS))
    step = max(1, math.ceil(len(starts) / MAX_CHECKED_BLOCKS))
    shifted = []
    for start in starts[::step]:
        stop = total if start + 1.5 * BLOCK_PAIRS > total else start + BLOCK_PAIRS
        offset = _find_shift(pairs, start, stop, total)
        pairs.forget()
        if offset:
            shifted.append((start, stop, offset))
    if shifted:
        start, _, offset = shifted[0]
        raise CorpusError(
            f"{name}: from about pair {start + 1:,} ({corpus[start].origin}) on, sources fit the target {abs(offset)} "
            f"{'below' if offset > 0 else 'above'} better than their own ({len(shifted)} blocks of {BLOCK_PAIRS} "
            f"pairs): the file is shifted by {offset:+d}; look for a missing or an extra line there"
        )
    if total < MIN_PAIRS_FOR_RANDOM or min(pairs.source_lengths.std(), pairs.target_lengths.std()) < MIN_LENGTH_SPREAD:
        return
    rows = pairs.sample
    likeness = pairs.likeness(rows, rows)
    random_likeness = pairs.likeness(rows, rows[derangement(len(rows))])
    if _deviations(likeness - random_likeness) < MIN_RANDOM_DEVIATIONS:
        raise CorpusError(
            f"{name}: the pairs are no more alike than random ones (likeness {likeness.mean():.3f} against "
            f"{random_likeness.mean():.3f}): sources and targets do not belong together; check the files' order"
        )


# --------------------------------------------------------------------------------------------------------- leakage


def check_leakage(splits: Mapping[str, Sequence[Pair]]) -> None:
    """Refuse splits that share a sentence or a near-duplicate on either side.

    Memory goes with all splits but the largest, which is read once, by all cores, and not kept.
    """
    largest = max(splits, key=lambda name: len(splits[name]))
    owners: tuple[dict[str, tuple[str, int]], ...] = ({}, {})
    for name in (other for other in splits if other != largest):
        for index, pair in enumerate(splits[name]):
            for side, text in enumerate(pair[:2]):
                owner = owners[side].setdefault(make_key(text), (name, index))
                if owner[0] != name:
                    raise _describe_leak(side, text, (name, index), owner)
    known = [np.fromiter(map(hash_key, keys), dtype=np.uint64, count=len(keys)) for keys in owners]
    pairs = iter(splits[largest])
    chunks = iter(lambda: [pair[:2] for pair in itertools.islice(pairs, LEAKAGE_CHUNK_PAIRS)], [])
    for number, hashes in enumerate(map_in_order(_hash_sides, chunks)):
        suspects = np.isin(hashes[:, 0], known[0]) | np.isin(hashes[:, 1], known[1])
        for index in (number * LEAKAGE_CHUNK_PAIRS + np.flatnonzero(suspects)).tolist():
            for side, text in enumerate(splits[largest][index][:2]):
                owner = owners[side].get(make_key(text), (largest, index))
                if owner[0] != largest:
                    raise _describe_leak(side, text, (largest, index), owner)


def _hash_sides(pairs: Sequence[tuple[str, str]]) -> NDArray[np.uint64]:
    """(N, 2) hashes of the keys of both sides."""
    return np.array([[hash_key(make_key(text)) for text in pair] for pair in pairs], dtype=np.uint64)


def _describe_leak(side: int, text: str, place: tuple[str, int], owner: tuple[str, int]) -> CorpusError:
    return CorpusError(
        f"corpus: {('source', 'target')[side]} {text[:80]!r} of {place[0]} (pair {place[1] + 1:,}) is in {owner[0]} as"
        f" well (pair {owner[1] + 1:,}): scores would be flattered; remove it from one of the two"
    )


# -------------------------------------------------------------------------------------------------- teacher and loss


def check_teacher(
    teacher_scores: Mapping[str, float], num_teacher_params: int, num_student_params: int
) -> list[PreflightWarning]:
    """Warn of a teacher that is not worth copying, or too far from the student to be copied well."""
    warnings = []
    bleu = teacher_scores["bleu"]
    if bleu < MIN_TEACHER_BLEU:
        warnings.append(
            PreflightWarning(
                "poor_teacher",
                f"the teacher reaches {bleu:.1f} BLEU on validation (under {MIN_TEACHER_BLEU:g}): a student can hardly "
                "be better; train it longer (teacher.training.num_iterations) or load a better one",
            )
        )
    ratio = num_teacher_params / num_student_params
    if ratio > MAX_SIZE_RATIO:
        warnings.append(
            PreflightWarning(
                "large_size_gap",
                f"the teacher has {ratio:.1f} times the student's parameters ({num_teacher_params:,} against "
                f"{num_student_params:,}): over {MAX_SIZE_RATIO:g} times, students copy badly; enlarge student.model "
                "or distil through a model in between",
            )
        )
    return warnings


def check_loss_balance(
    effective_targets: float, vocab_size: int, gradient_ratio: float, temperature: float
) -> list[PreflightWarning]:
    """Warn when the distillation term hardly moves the weights.

    `effective_targets`: exp of the mean entropy of the softened teacher. `gradient_ratio`: norm of the distillation
    term's gradient to that of the task term, both weighted.
    """
    if not math.isfinite(gradient_ratio) or gradient_ratio >= MIN_GRADIENT_RATIO:
        return []
    return [
        PreflightWarning(
            "weak_distillation",
            f"at distillation.temperature {temperature:g} the teacher spreads over {effective_targets:,.0f} of "
            f"{vocab_size:,} targets and its gradient is {gradient_ratio:.2f} of the task's (under "
            f"{MIN_GRADIENT_RATIO:g}): the student hardly learns from it; lower the temperature (small models: 1 or 2)",
        )
    ]


# ------------------------------------------------------------------------------------------------------------- disk


def check_disk(path: Path, needed_bytes: int) -> int:
    """Free bytes where `path` is or will be; NoRoomError if they are fewer than needed."""
    existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise NoRoomError(
            f"output_dir {path}: the run needs about {needed_bytes / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are "
            "free: make room or choose another folder"
        )
    return free
