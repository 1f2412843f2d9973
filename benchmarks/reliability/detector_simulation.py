"""Synthetic runs for `detector`: real validations' noise, true qualities that are known, and the product's rules.

Everything is done for many validations at once, which is what makes thousands of runs affordable; the rules are the
detector's own (`validation.detector`, `validation.drift`) and `check_against_detector` compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import BenchmarkError
from cvm_translator.config import load_config
from cvm_translator.config.schema import GuardConfig
from cvm_translator.metrics import METRICS, Metric, MetricOptions
from cvm_translator.metrics.base import FloatArray
from cvm_translator.metrics.resampling import resampling_counts
from cvm_translator.validation.config import ValidationConfig
from cvm_translator.validation.detector import QualityDegradationDetector
from cvm_translator.validation.drift import accumulate_drift
from cvm_translator.validation.evaluator import QualityMeasurement
from cvm_translator.validation.files import ValidationFiles
from cvm_translator.validation.quality import QualityScale, build_quality_scale

NUM_VALIDATIONS = 10
NUM_BEFORE_DROP = 5
DROPS = (0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.09, 0.10, 0.12)
SLOPES = (0.005, 0.01, 0.015, 0.02)

Float32Array = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


# ---------------------------------------------------------------------------------------------------- what was recorded


@dataclass(frozen=True)
class Recording:
    """Per-sentence statistics of one real run: the teacher's, the last checkpoints' and the first one's."""

    name: str
    config: ValidationConfig
    metrics: dict[str, Metric]
    """Those that count."""
    teacher: Float32Array = field(repr=False)
    """(N, C), the metrics' statistics side by side."""
    checkpoints: Float32Array = field(repr=False)
    """(K + 1, N, C); the last is the first recorded checkpoint, of which drops are made."""
    steps: tuple[int, ...]
    """Of the K last checkpoints and, at the end, of the first."""

    @property
    def num_mixed(self) -> int:
        return len(self.checkpoints) - 1

    def split(self, columns: FloatArray) -> dict[str, FloatArray]:
        """Statistics (..., C) by metric."""
        widths = [self._num_columns(name) for name in self.metrics]
        parts = np.split(columns.astype(np.float64), np.cumsum(widths)[:-1], axis=-1)
        return dict(zip(self.metrics, parts, strict=True))

    def scores(self, columns: FloatArray) -> dict[str, FloatArray]:
        return {name: self.metrics[name].score(part) for name, part in self.split(columns).items()}

    def build_scale(self, teacher_scores: Mapping[str, float]) -> QualityScale:
        return build_quality_scale(list(self.metrics.values()), self.config.settings.weights, teacher_scores)

    def _num_columns(self, name: str) -> int:
        return {"bleu": 10, "chrf": 18}.get(name, 2)


def load_recording(run_dir: Path, num_last: int) -> Recording:
    """Read a run's validations; BenchmarkError where there are too few."""
    layout_config = load_config(run_dir / "config.yaml")
    config = ValidationConfig.from_run(layout_config)
    files = ValidationFiles(run_dir / "validation")
    found = sorted((int(path.name[5:-5]), path.name[:-5]) for path in files.directory.glob("step_*[0-9].json")
                   if path.name[5:-5].isdigit())  # fmt: skip
    if len(found) < num_last + 1:
        raise BenchmarkError(
            f"{files.directory} has {len(found)} validations: at least {num_last + 1} are needed (--last {num_last})"
        )
    chosen = [*found[-num_last:], found[0]]
    options = MetricOptions(target_language=config.target_language, device="cpu")
    teacher = files.read_measurement("teacher")
    names = [name for name, weight in config.settings.weights.items() if weight > 0 and name in teacher.statistics]
    metrics = {metric.name: metric for name in names for metric in METRICS[name](options)}

    def columns(measurement: QualityMeasurement) -> Float32Array:
        if measurement.set_sha256 != teacher.set_sha256:
            raise BenchmarkError(f"{run_dir} has validations of different sets")
        # Sums of counts stay far below 2**24, so 32 bits hold them exactly.
        return np.concatenate([measurement.statistics[name] for name in metrics], axis=1).astype(np.float32)

    return Recording(
        run_dir.name,
        config,
        metrics,
        columns(teacher),
        np.stack([columns(files.read_measurement(stem)) for _, stem in chosen]),
        tuple(step for step, _ in chosen),
    )


# ----------------------------------------------------------------------------------------------------------- simulation


@dataclass(frozen=True)
class Judged:
    """One synthetic run's validations under the product's rules; arrays (V,)."""

    is_best: BoolArray
    drop: FloatArray
    lower: FloatArray
    """One-sided lower bound of the drop against the best before it; 0 for the first."""


class Simulator:
    """Synthetic runs on one recording with validation sets of one size."""

    def __init__(self, recording: Recording, num_sentences: int, guard: GuardConfig) -> None:
        self.recording = recording
        self.num_sentences = num_sentences
        self.guard = guard
        config = recording.config
        # The detector's own matrix.
        self.counts = resampling_counts(num_sentences, guard.num_resamples, config.seed).astype(np.float32)
        self._shares = np.linspace(0.0, 1.0, 201)
        sums = recording.checkpoints.astype(np.float64).sum(axis=1)  # (K + 1, C)
        self._sums = sums
        teacher = recording.scores(recording.teacher.astype(np.float64).sum(axis=0))
        self._scale = recording.build_scale({name: float(score) for name, score in teacher.items()})

    # -------------------------------------------------------------------------------------------- true quality

    def true_quality(self, mixtures: FloatArray) -> FloatArray:
        """Q on all recorded sentences of checkpoints that are mixtures (..., K + 1)."""
        return self._scale.quality(self.recording.scores(mixtures @ self._sums))

    def draw_mixture(self, generator: np.random.Generator) -> FloatArray:
        """Shares of a healthy checkpoint (K + 1,): none of the first recorded one."""
        return np.append(generator.dirichlet(np.ones(self.recording.num_mixed)), 0.0)

    def lower_quality(self, mixture: FloatArray, drop: float) -> FloatArray:
        """The mixture with as much of the first recorded checkpoint as makes its true quality fall by `drop`."""
        worst = np.zeros(len(mixture))
        worst[-1] = 1.0
        blends = (1.0 - self._shares[:, None]) * mixture + self._shares[:, None] * worst
        drops = 1.0 - self.true_quality(blends) / self.true_quality(mixture)
        if drops[-1] < drop:
            raise BenchmarkError(
                f"{self.recording.name}: its first checkpoint is only {drops[-1]:.1%} worse, no drop of {drop:.1%} can "
                "be made of it"
            )
        share = np.interp(drop, np.maximum.accumulate(drops), self._shares)
        return np.asarray((1.0 - share) * mixture + share * worst)

    # ------------------------------------------------------------------------------------------- what is measured

    def draw_sentences(self, generator: np.random.Generator) -> NDArray[np.int64]:
        return generator.integers(self.recording.teacher.shape[0], size=self.num_sentences)

    def draw_statistics(
        self, generator: np.random.Generator, sentences: NDArray[np.int64], mixtures: FloatArray
    ) -> Float32Array:
        """Statistics (V, N, C) of checkpoints that are mixtures (V, K + 1)."""
        edges = np.cumsum(mixtures, axis=1)
        uniform = generator.random((len(mixtures), len(sentences)))
        choices = np.stack(
            [np.searchsorted(edge, row * edge[-1], side="right") for edge, row in zip(edges, uniform, strict=True)]
        )
        drawn: Float32Array = self.recording.checkpoints[np.minimum(choices, self.recording.num_mixed), sentences]
        return drawn

    def measure(self, sentences: NDArray[np.int64], statistics: Float32Array) -> tuple[FloatArray, FloatArray]:
        """Q (V,) and its draws (V, draws), the teacher resampled along, as the detector computes them."""
        teacher = self.recording.teacher[sentences]
        everything = np.concatenate([teacher[None], statistics])  # (1 + V, N, C)
        size, num_columns = len(everything), everything.shape[-1]
        flat = np.ascontiguousarray(everything.transpose(1, 0, 2).reshape(len(sentences), -1))
        drawn = (self.counts @ flat).reshape(-1, size, num_columns).transpose(1, 0, 2)  # (1 + V, draws, C)
        points = everything.astype(np.float64).sum(axis=1)
        point_scores, draw_scores = self.recording.scores(points), self.recording.scores(drawn)
        scale = self.recording.build_scale({name: float(scores[0]) for name, scores in point_scores.items()})
        quality = scale.quality({name: scores[1:] for name, scores in point_scores.items()})
        draws = scale.quality(
            {name: scores[1:] for name, scores in draw_scores.items()},
            {name: scores[:1] for name, scores in draw_scores.items()},
        )
        return quality, draws

    def lower_bound(self, new: FloatArray, best: FloatArray) -> float:
        safe = np.where(best > 0, best, 1.0)
        drops = np.where(best > 0, 1.0 - new / safe, 0.0)
        return float(np.quantile(drops, 1.0 - self.guard.confidence))

    def judge(self, quality: FloatArray, draws: FloatArray) -> Judged:
        """Each validation against the best before it, as `QualityDegradationDetector.judge` does."""
        num_validations = len(quality)
        is_best = np.zeros(num_validations, dtype=np.bool_)
        drop, lower = np.zeros(num_validations), np.zeros(num_validations)
        best = 0
        is_best[0] = True
        for index in range(1, num_validations):
            drop[index] = 1.0 - quality[index] / quality[best]
            lower[index] = self.lower_bound(draws[index], draws[best])
            if quality[index] > quality[best]:
                is_best[index] = True
                best = index
        return Judged(is_best, drop, lower)


def find_alarms(judged: Judged, guard: GuardConfig) -> BoolArray:
    """Which validations (..., V) are degraded, by a single drop or by a slow decline."""
    margin = guard.degradation_threshold
    single = ~judged.is_best & (judged.lower > margin)
    if guard.drift_limit is None:
        return single
    drift = np.zeros(judged.lower.shape[:-1])
    slow = np.zeros(judged.lower.shape, dtype=np.bool_)
    for index in range(judged.lower.shape[-1]):
        added = accumulate_drift(drift, judged.lower[..., index], guard.drift_allowance * margin)
        drift = np.where(judged.is_best[..., index], 0.0, added)
        slow[..., index] = drift > guard.drift_limit * margin
    return single | slow


# ------------------------------------------------------------------------------------------------------------- the runs


@dataclass(frozen=True)
class Simulated:
    """Many runs of one kind: arrays (R, V); for `power` the last axis is the size of the drop."""

    healthy: Judged
    power: Judged
    declines: dict[float, Judged]


def simulate_runs(simulator: Simulator, seed: Sequence[int], num_runs: int, num_declines: int) -> dict[str, FloatArray]:
    """Arrays by name, as they are kept in a part's file. The first `num_declines` runs are simulated declining too."""
    kept: dict[str, list[FloatArray]] = {}

    def keep(name: str, judged: Judged) -> None:
        for key in ("is_best", "drop", "lower"):
            kept.setdefault(f"{name}.{key}", []).append(getattr(judged, key))

    for number in range(num_runs):
        generator = np.random.default_rng([*seed, number])
        sentences = simulator.draw_sentences(generator)
        healthy = np.stack([simulator.draw_mixture(generator) for _ in range(NUM_VALIDATIONS)])
        statistics = simulator.draw_statistics(generator, sentences, healthy)
        quality, draws = simulator.measure(sentences, statistics)
        judged = simulator.judge(quality, draws)
        keep("healthy", judged)
        best = int(np.flatnonzero(judged.is_best[:NUM_BEFORE_DROP])[-1])
        lowered = np.stack([simulator.lower_quality(healthy[best], drop) for drop in DROPS])
        dropped, dropped_draws = simulator.measure(sentences, simulator.draw_statistics(generator, sentences, lowered))
        keep(
            "power",
            Judged(
                dropped > quality[best],
                1.0 - dropped / quality[best],
                np.array([simulator.lower_bound(row, draws[best]) for row in dropped_draws]),
            ),
        )
        for slope in SLOPES if number < num_declines else ():
            falling = np.stack(
                [simulator.lower_quality(mixture, slope * index) for index, mixture in enumerate(healthy)]
            )
            measured = simulator.measure(sentences, simulator.draw_statistics(generator, sentences, falling))
            keep(f"decline_{slope}", simulator.judge(*measured))
    return {name: np.stack(rows) for name, rows in kept.items()}


def check_against_detector(simulator: Simulator, seed: Sequence[int], num_runs: int) -> list[str]:
    """Ask the detector itself about declining runs, which show every verdict; what differs, if anything."""
    different = []
    recording, guard = simulator.recording, simulator.guard
    for number in range(num_runs):
        generator = np.random.default_rng([*seed, number, 1])
        sentences = simulator.draw_sentences(generator)
        slope = SLOPES[number % len(SLOPES)]
        mixtures = np.stack(
            [
                simulator.lower_quality(simulator.draw_mixture(generator), slope * index)
                for index in range(NUM_VALIDATIONS)
            ]
        )
        statistics = simulator.draw_statistics(generator, sentences, mixtures)
        judged = simulator.judge(*simulator.measure(sentences, statistics))
        alarms = find_alarms(judged, guard)

        def build(rows: Float32Array) -> QualityMeasurement:
            parts = recording.split(rows.astype(np.float64))
            scores = {name: float(recording.metrics[name].score(part.sum(axis=0))) for name, part in parts.items()}
            return QualityMeasurement("set", len(rows), scores, parts, {}, 1.0)

        teacher = build(recording.teacher[sentences])
        detector = QualityDegradationDetector(
            replace(recording.config, guard=guard),
            recording.build_scale(teacher.scores), "set", len(sentences), teacher,
        )  # fmt: skip
        for index, rows in enumerate(statistics):
            verdict = detector.judge(build(rows), index)
            if (
                verdict.is_new_best != judged.is_best[index]
                or verdict.asks_for_rollback != alarms[index]
                or abs((verdict.drop_lower_bound or 0.0) - (0.0 if index == 0 else judged.lower[index])) > 1e-5
            ):
                different.append(f"{recording.name}, run {number}, validation {index + 1}: {verdict.reason}")
    return different
