"""Learning-rate schedules: pure functions of the step, so there is no state to lose."""

from __future__ import annotations

import math
from collections.abc import Callable

from cvm_translator.config.schema import TrainingConfig


def _linear(progress: float, _: float) -> float:
    return 1.0 - progress


def _cosine(progress: float, _: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _inverse_sqrt(_: float, steps_over_warmup: float) -> float:
    return 1.0 / math.sqrt(steps_over_warmup)


def _constant(_: float, __: float) -> float:
    return 1.0


# (share of the decay that is done, step / warm-up steps) -> share of the peak learning rate
DECAYS: dict[str, Callable[[float, float], float]] = {
    "linear": _linear,
    "cosine": _cosine,
    "inverse_sqrt": _inverse_sqrt,
    "constant": _constant,
}


def compute_learning_rate(settings: TrainingConfig, step: int) -> float:
    """Learning rate of the 1-based `step`: linear warm-up, then the chosen decay down to its floor."""
    warmup = settings.warmup_steps
    if step <= warmup:
        return settings.learning_rate * step / warmup
    progress = (step - warmup) / max(1, settings.num_iterations - warmup)
    share = DECAYS[settings.schedule](min(1.0, progress), step / max(1, warmup))
    return settings.learning_rate * max(settings.min_learning_rate_ratio, share)
