"""Advice where the numbers of a run call for it: a pure function from figures to sentences.

Every rule names the figure that made it speak and the setting to change; where a figure is missing its rule is silent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

MIN_LOSS_FALL = 0.02
OVERFIT_QUALITY_FALL = 0.02
STRONG_RETENTION = 1.02
WEAK_TEACHER_BLEU = 15.0
MAX_COMPRESSION = 10.0
BRIDGED_RETENTION = 0.97
LARGE_QUANTISATION_GAP = 0.02
MANY_SKIPS = 0.01
MIN_GRADIENT_RATIO = 0.2


@dataclass(frozen=True)
class AdviceFacts:
    """What advice is drawn from; NaN and empty mean not measured."""

    temperature: float = math.nan
    losses: Sequence[float] = field(default_factory=list)
    """Mean training loss of equal stretches of the run, in order (about ten)."""
    qualities: Sequence[float] = field(default_factory=list)
    """Quality scores of the validations, in order of steps."""
    retention: float = math.nan
    """Quality score of the deployed student on the test set: its share of the teacher's."""
    teacher_bleu: float = math.nan
    compression: float = math.nan
    """Parameters of the teacher over those of the student."""
    quantisation_gap: float = math.nan
    """Quality score of the float student less that of the quantised one."""
    quantisation_start: float = math.nan
    """Share of the steps after which fake quantisation began; NaN when training never saw it."""
    skipped_share: float = math.nan
    gradient_ratio: float = math.nan
    num_rollbacks: int = 0
    halted: bool = False


def advise(facts: AdviceFacts) -> list[str]:
    """Sentences for the reader, the most pressing first; empty when nothing calls for a change."""
    rules = (
        _on_halt, _on_convergence, _on_gradient_ratio, _on_overfitting, _on_length, _on_teacher, _on_compression,
        _on_quantisation, _on_skips,
    )  # fmt: skip
    return [sentence for rule in rules if (sentence := rule(facts))]


def _on_halt(facts: AdviceFacts) -> str | None:
    if not facts.halted:
        return None
    return (
        f"The guard halted the run after {facts.num_rollbacks} rollbacks: lower distillation.learning_rate (by half to"
        " begin with), and look at the steps before each rollback for a fault in the data."
    )


def _on_convergence(facts: AdviceFacts) -> str | None:
    """The loss of the second half of the run is hardly below that of its first stretch."""
    losses = [loss for loss in facts.losses if math.isfinite(loss)]
    if len(losses) < 4 or losses[0] <= 0:
        return None
    fall = 1 - min(losses[len(losses) // 2 :]) / losses[0]
    if fall >= MIN_LOSS_FALL:
        return None
    remedy = "lower distillation.learning_rate or look at the data"
    if facts.temperature > 1:
        remedy = (
            f"lower distillation.temperature (now {facts.temperature:g}; small vocabularies and weak teachers want 1-2)"
        )
    return f"The training loss fell by only {100 * max(fall, 0):.1f} % over the run and does not converge: {remedy}."


def _on_gradient_ratio(facts: AdviceFacts) -> str | None:
    if not facts.gradient_ratio < MIN_GRADIENT_RATIO:
        return None
    return (
        f"The distillation term's gradient is {facts.gradient_ratio:.2f} of the task term's, so the teacher is hardly"
        f" heard: lower distillation.temperature (now {facts.temperature:g}) or raise distillation.alpha."
    )


def _on_overfitting(facts: AdviceFacts) -> str | None:
    """Quality on validation fell from its best while the training loss went on falling."""
    qualities = [quality for quality in facts.qualities if math.isfinite(quality)]
    losses = [loss for loss in facts.losses if math.isfinite(loss)]
    if len(qualities) < 4 or len(losses) < 4:
        return None
    place = max(range(len(qualities)), key=qualities.__getitem__)
    fall = 1 - qualities[-1] / qualities[place] if qualities[place] > 0 else 0.0
    since_best = losses[min(len(losses) - 1, place * len(losses) // len(qualities)) :]
    if place > len(qualities) - 3 or fall < OVERFIT_QUALITY_FALL or losses[-1] >= since_best[0]:
        return None
    return (
        f"The training loss still fell while the quality on validation fell by {100 * fall:.1f} % from its best: the"
        " student overfits. Use more text, fewer distillation.num_iterations, or more student.model.dropout."
    )


def _on_length(facts: AdviceFacts) -> str | None:
    """The quality still rose at the end of the run."""
    qualities = [quality for quality in facts.qualities if math.isfinite(quality)]
    if len(qualities) < 4 or facts.halted or not facts.retention < 1.0:
        return None
    rise = qualities[-1] / qualities[-3] - 1 if qualities[-3] > 0 else 0.0
    if rise < 0.03 or qualities[-1] < max(qualities):
        return None
    return (
        f"The quality still rose by {100 * rise:.1f} % over the last two validations: more"
        " distillation.num_iterations or a higher distillation.learning_rate would take the student further."
    )


def _on_teacher(facts: AdviceFacts) -> str | None:
    if facts.retention > STRONG_RETENTION:
        return (
            f"The student scores {100 * facts.retention:.1f} % of its teacher: the teacher is the bottleneck. Train it"
            " longer or larger, or raise distillation.beta to learn more from the references."
        )
    if facts.teacher_bleu < WEAK_TEACHER_BLEU:
        return (
            f"The teacher itself scores only {facts.teacher_bleu:.1f} BLEU: it is the bottleneck. A better teacher"
            " helps more than a better distillation."
        )
    return None


def _on_compression(facts: AdviceFacts) -> str | None:
    if not facts.compression > MAX_COMPRESSION or facts.retention >= BRIDGED_RETENTION:
        return None
    return (
        f"The student has {facts.compression:.1f} times fewer parameters than its teacher, more than one step of"
        " distillation bridges well: enlarge student.model, or distil through a student of middle size."
    )


def _on_quantisation(facts: AdviceFacts) -> str | None:
    if not facts.quantisation_gap > LARGE_QUANTISATION_GAP:
        return None
    remedy = "train with quantization.method: qat"
    if facts.quantisation_start > 0:
        remedy = f"begin fake quantisation earlier (quantization.start_fraction, now {facts.quantisation_start:g})"
    elif facts.quantisation_start == 0:
        remedy = "train longer at a lower learning rate: fake quantisation was on from the first step"
    return f"Quantisation costs {100 * facts.quantisation_gap:.1f} points of the quality score: {remedy}."


def _on_skips(facts: AdviceFacts) -> str | None:
    if not facts.skipped_share > MANY_SKIPS:
        return None
    return (
        f"{100 * facts.skipped_share:.1f} % of the batches were skipped for a non-finite loss or a spike: lower"
        " distillation.learning_rate, lengthen distillation.warmup_steps, or train in float32."
    )
