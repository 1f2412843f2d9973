"""Is the model worse than its best? A claim of degradation must survive the noise of the validation set.

D = 1 - Q_new/Q_best. One resampling matrix (fixed seed) is applied to the stored per-sentence statistics of new, best
and teacher alike. *Degraded*: the one-sided lower bound of D exceeds the margin. *Warning*: only the point estimate
does. *Degraded* as well: a slow decline that no single validation shows (see `drift`). *Emergency*: over half of the
output is empty, a loop or a copy. *No decision*: the validation set changed, or a metric that counts crashed or is NaN.
Neither "lower than before" nor "p < 0.05 against the best of many" is asked:
both raise false alarms in most healthy runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np

from cvm_translator.errors import CorpusError
from cvm_translator.metrics.base import FloatArray
from cvm_translator.metrics.resampling import confidence_interval, resampling_counts
from cvm_translator.validation.config import ValidationConfig
from cvm_translator.validation.drift import accumulate_drift
from cvm_translator.validation.evaluator import QualityMeasurement
from cvm_translator.validation.quality import QualityScale, draw_scores

VERDICTS = ("first", "improved", "healthy", "warning", "degraded", "no_decision", "emergency")
COLLAPSED_SHARE = 0.5
TREND_WINDOW = 5
FLAT_TREND = 0.002
NUM_RECENT_DRAWS = 4  # new, best, previous, and one to spare


@dataclass(frozen=True)
class Verdict:
    """The detector's answer on one validation. Fractions, not percent."""

    verdict: str
    reason: str
    margin: float
    quality_score: float | None = None
    quality_interval: tuple[float, float] | None = None
    """95 % interval of Q."""
    drop: float | None = None
    """1 - Q_new/Q_best."""
    drop_lower_bound: float | None = None
    drift: float | None = None
    """What the lower bounds since the best add up to, each less the allowance; beyond a limit it is a slow decline."""
    best_step: int | None = None
    best_quality: float | None = None
    trend: float | None = None
    """Slope of Q per validation over the last few."""
    trend_message: str = ""

    @property
    def is_new_best(self) -> bool:
        return self.verdict in ("first", "improved")

    @property
    def asks_for_rollback(self) -> bool:
        return self.verdict in ("degraded", "emergency")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Verdict:
        interval = data.get("quality_interval")
        return cls(**{**data, "quality_interval": tuple(interval) if interval else None})


class QualityDegradationDetector:
    """Compares validations with the best so far.

    `judge` keeps the history and the best; `compare` is the bare test. `teacher` is the teacher's measurement on the
    same sentences (None while the teacher itself is trained).
    """

    def __init__(
        self,
        config: ValidationConfig,
        scale: QualityScale,
        set_sha256: str,
        num_sentences: int,
        teacher: QualityMeasurement | None = None,
    ) -> None:
        if (scale.teacher_values is None) != (teacher is None):
            raise ValueError("the quality scale and the detector must both have a teacher, or neither")
        self.config = config
        self.scale = scale
        self.set_sha256 = set_sha256
        self.counts = resampling_counts(num_sentences, config.guard.num_resamples, config.seed)
        self._recent_draws: list[tuple[QualityMeasurement, dict[str, FloatArray]]] = []
        self._teacher_draws = None if teacher is None else self.draw_scores(teacher)
        obstacle = None if teacher is None else self._find_undrawn(teacher)
        if obstacle is not None:
            raise CorpusError(f"the teacher's output cannot be judged: {obstacle}")
        self._teacher = teacher
        self.best: QualityMeasurement | None = None
        self.best_at: tuple[int, int] | None = None
        """Step and attempt of the best."""
        self.history: list[tuple[int, int, float]] = []
        """Step, attempt and Q of every validation that had one."""
        self._drop_noise: float | None = None
        self._drift = 0.0

    # ------------------------------------------------------------------------------------------------ numbers

    def draw_scores(self, measurement: QualityMeasurement) -> dict[str, FloatArray]:
        """Every metric's scores (draws,) under this detector's resampling matrix; one that fails now is left out."""
        return self._draw(measurement)[0]

    def _draw(self, measurement: QualityMeasurement) -> tuple[dict[str, FloatArray], dict[str, str]]:
        """Scores and failures. The last few are remembered, but not failures: a metric is tried again the next time."""
        for known, draws in self._recent_draws:
            if known is measurement:
                return draws, {}
        draws, failures = draw_scores(self.scale.metrics, self.counts, measurement.statistics)
        if not failures:
            self._recent_draws = [*self._recent_draws[1 - NUM_RECENT_DRAWS :], (measurement, draws)]
        return draws, failures

    def _find_undrawn(self, measurement: QualityMeasurement) -> str | None:
        """Which metric that counts has no scores on resampled sentences, and why; or None."""
        for name, reason in self._draw(measurement)[1].items():
            if name in self.scale.weights:
                return f"{name} could not be computed on resampled sentences ({reason})"
        return None

    def quality(self, measurement: QualityMeasurement) -> float:
        return float(self.scale.quality(measurement.scores))

    def quality_draws(self, measurement: QualityMeasurement) -> FloatArray:
        """Q (draws,), the teacher resampled along."""
        return self.scale.quality(self.draw_scores(measurement), self._teacher_draws)

    def drop_draws(self, new: QualityMeasurement, best: QualityMeasurement) -> FloatArray:
        """D (draws,); 0 in a draw in which the best is worthless."""
        quality_new, quality_best = self.quality_draws(new), self.quality_draws(best)
        safe = np.where(quality_best > 0, quality_best, 1.0)
        return np.asarray(np.where(quality_best > 0, 1.0 - quality_new / safe, 0.0), dtype=np.float64)

    def smallest_detectable_drop(self, power: float = 0.99) -> float:
        """The true drop that one validation reports as degraded with probability `power`.

        margin + (z_confidence + z_power) * noise. The noise is that between the last two bests if there were two;
        before that, the relative noise of the teacher's own quality (what it is if two checkpoints correlate by half).
        """
        normal = NormalDist()
        guard = self.config.guard
        return guard.degradation_threshold + self.noise() * (normal.inv_cdf(guard.confidence) + normal.inv_cdf(power))

    def noise(self) -> float:
        """Relative standard deviation of Q_new/Q_best that stems from the choice of sentences."""
        if self._drop_noise is not None:
            return self._drop_noise
        measurement = self._teacher or self.best
        if measurement is None:
            raise ValueError("the detector has measured nothing yet: no noise to estimate")
        draws = self.scale.quality(self.draw_scores(measurement))
        return float(draws.std() / draws.mean())

    # ----------------------------------------------------------------------------------------------- verdicts

    def find_obstacle(self, new: QualityMeasurement, best: QualityMeasurement | None) -> str | None:
        """Why the two cannot be compared, or None."""
        if new.set_sha256 != self.set_sha256:
            return "the validation set is not the one this run began with"
        if best is not None and best.set_sha256 != new.set_sha256:
            return "the best was measured on another validation set"
        for name in self.scale.weights:
            if name in new.failures:
                return f"{name} could not be computed ({new.failures[name]})"
            if not np.isfinite(new.scores.get(name, np.nan)) or not np.isfinite(new.statistics[name]).all():
                return f"{name} is not a number"
        undrawn = self._find_undrawn(new)
        return undrawn if undrawn is not None or best is None else self._find_undrawn(best)

    def compare(
        self, new: QualityMeasurement, best: QualityMeasurement | None, best_step: int | None = None
    ) -> Verdict:
        """Judge one measurement against the best; changes nothing."""
        margin = self.config.guard.degradation_threshold
        obstacle = self.find_obstacle(new, best)
        if obstacle is not None:
            return Verdict("no_decision", obstacle, margin, best_step=best_step)
        quality = self.quality(new)
        common: dict[str, Any] = {
            "margin": margin,
            "quality_score": quality,
            "quality_interval": confidence_interval(self.quality_draws(new)),
        }
        if best is None:
            return Verdict("first", "nothing to compare with yet", **common)
        best_quality = self.quality(best)
        drop = 1.0 - quality / best_quality if best_quality > 0 else 0.0
        draws = self.drop_draws(new, best)
        lower = float(np.quantile(draws, 1.0 - self.config.guard.confidence))
        common.update(best_step=best_step, best_quality=best_quality, drop=drop, drop_lower_bound=lower)
        share = new.collapsed_share
        against = f"{drop:+.1%} against the best (step {best_step}), lower bound {lower:+.1%}, margin {margin:.1%}"
        if share > COLLAPSED_SHARE >= best.collapsed_share:
            reason = f"{share:.0%} of the output is empty, repeating or copied"
            return Verdict("emergency", reason, **common)
        if quality > best_quality:
            return Verdict("improved", f"quality {quality:.4f}, best was {best_quality:.4f}", **common)
        if lower > margin:
            return Verdict("degraded", f"dropped by {against}", **common)
        if drop > margin:
            return Verdict("warning", f"dropped by {against}: not certain", **common)
        return Verdict("healthy", f"dropped by {against}", **common)

    def judge(self, new: QualityMeasurement, step: int, attempt: int = 1) -> Verdict:
        """Judge the validation at `step` against the best so far and remember it."""
        verdict = self.compare(new, self.best, self.best_at[0] if self.best_at else None)
        if verdict.quality_score is None:
            return verdict
        self.history.append((step, attempt, verdict.quality_score))
        slope, message = describe_trend([quality for *_, quality in self.history[-TREND_WINDOW:]])
        verdict = self._add_drift(verdict)
        if verdict.is_new_best:
            if self.best is not None:
                ratios = 1.0 - self.drop_draws(new, self.best)  # Q_new/Q_best
                self._drop_noise = float(ratios.std() / ratios.mean())
            self.best, self.best_at = new, (step, attempt)
        return replace(verdict, trend=slope, trend_message=message)

    def _add_drift(self, verdict: Verdict) -> Verdict:
        """Take the drop into the sum that tells a slow decline; the verdict says so where the sum exceeds its limit."""
        guard = self.config.guard
        if verdict.is_new_best or verdict.drop_lower_bound is None:
            self._drift = 0.0
            return replace(verdict, drift=self._drift)
        allowance = guard.drift_allowance * verdict.margin
        self._drift = float(accumulate_drift(self._drift, verdict.drop_lower_bound, allowance))
        verdict = replace(verdict, drift=self._drift)
        limit = guard.drift_limit * verdict.margin if guard.drift_limit is not None else np.inf
        if verdict.asks_for_rollback or self._drift <= limit:
            return verdict
        reason = (
            f"slow decline: since the best (step {verdict.best_step}) the lower bounds of the drops, each less"
            f" {allowance:.1%}, add up to {self._drift:.1%}, limit {limit:.1%}; this validation {verdict.reason}"
        )
        return replace(verdict, verdict="degraded", reason=reason)

    def start_new_best(self) -> None:
        """Forget the best and the trend: what is measured from now on is not comparable (another bit width)."""
        self.best, self.best_at, self.history = None, None, []
        self._drift = 0.0

    # -------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """Plain data; the best's per-sentence statistics stay in the validation files."""
        return {
            "history": [list(entry) for entry in self.history],
            "best_at": list(self.best_at) if self.best_at else None,
            "drop_noise": self._drop_noise,
            "drift": self._drift,
        }

    def load_state_dict(
        self, state: dict[str, Any], load_measurement: Callable[[int, int], QualityMeasurement]
    ) -> None:
        """Restore; `load_measurement(step, attempt)` reads a stored measurement."""
        self.history = [(int(step), int(attempt), float(quality)) for step, attempt, quality in state["history"]]
        self._drop_noise = state["drop_noise"]
        self._drift = float(state["drift"])
        self.best_at = (int(state["best_at"][0]), int(state["best_at"][1])) if state["best_at"] else None
        self.best = load_measurement(*self.best_at) if self.best_at else None


def describe_trend(qualities: list[float]) -> tuple[float | None, str]:
    """Least-squares slope of Q per validation, and the sentence that says so."""
    if len(qualities) < 2:
        return None, ""
    slope = float(np.polyfit(np.arange(len(qualities)), np.asarray(qualities), 1)[0])
    if abs(slope) < FLAT_TREND:
        return slope, f"quality is flat over the last {len(qualities)} validations"
    direction = "rising" if slope > 0 else "falling"
    return slope, f"quality is {direction} by {abs(slope):.4f} a validation over the last {len(qualities)}"
