"""From a verdict to an action: keep, roll back with a changed recipe, or halt with the best model.

The guard never looks at training losses to judge quality; it reads verdicts on generated output. An exact replay of the
failing steps would fail in the same way, so each rollback changes the recipe: the first reads other data, the second
also lowers the learning rate, the third lowers it once more. A rollback is written to disk before it is acted on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from cvm_translator.config.schema import GuardConfig
from cvm_translator.errors import CheckpointError
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.runs import atomic
from cvm_translator.training.state import LoopState

Action = Literal["keep", "roll_back", "halt"]


@dataclass(frozen=True)
class Judgement:
    """What a validation found, reduced to what the loop must know."""

    verdict: str
    is_best: bool
    is_degraded: bool
    reason: str
    figures: dict[str, Any]
    """What the verdict rests on, for the event: drop, drop_lower_bound, margin, quality_score."""
    is_held: bool = True
    """Whether the quality stands beside the best of the width before, so that fewer bits may be tried."""

    @property
    def is_decided(self) -> bool:
        """Whether the validation says anything of the model: its set was the same, and every metric gave a number."""
        return self.verdict != "no_decision"


class Judge(Protocol):
    """Validates a model and judges it against what came before; stateful, so it is part of each checkpoint."""

    def judge(self, state: LoopState, model: CvmTransformer, bits: int) -> Judgement:
        """Validate the model as deployed at `bits`."""
        ...

    def observe(self, state: LoopState, model: CvmTransformer, bits: int) -> None:
        """Validate for the record, without remembering anything."""
        ...

    def start_width(self) -> None:
        """Look for a new best: what follows is deployed with other bits."""
        ...

    def is_best_held(self) -> bool:
        """Whether the best at this width stands beside that of the width before."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


Translated = dict[str, Any]
"""What a model said on the validation set, with what else was measured of it: plain data, part of a checkpoint."""


class LateJudge(Protocol):
    """A judge whose verdict comes some steps after the translation it is about, while training goes on."""

    @property
    def is_late(self) -> bool:
        """Whether scores are computed beside training; what was left by a run that did so is concluded in any case."""
        ...

    def translate(self, model: CvmTransformer, bits: int) -> Translated:
        """Decode the validation set with the model as deployed at `bits`; nothing is remembered."""
        ...

    def begin_scoring(self, translated: Translated) -> None:
        """Return at once; the scores are computed meanwhile."""
        ...

    def conclude(self, step: int, attempt: int, translated: Translated) -> Judgement:
        """The judgement of that step, whose scores are waited for."""
        ...

    def close(self) -> None:
        """End what scores."""
        ...


@dataclass(frozen=True)
class Recipe:
    """What a rollback changes."""

    attempt: int
    data_stream: int
    learning_rate_factor: float


def next_recipe(state: LoopState, guard: GuardConfig) -> Recipe:
    """The recipe of the rollback that would follow those in `state`."""
    number = len(state.rollbacks) + 1
    factor = guard.rollback_learning_rate_factor ** (number - 1)
    return Recipe(attempt=state.attempt + 1, data_stream=state.data_stream + 1, learning_rate_factor=factor)


def choose_action(judgement: Judgement, state: LoopState, guard: GuardConfig) -> Action:
    """Keep what is not degraded; else roll back while the rules allow it. Where nothing was decided nothing changes."""
    if not guard.enabled or not judgement.is_decided:
        return "keep"
    if not judgement.is_degraded:
        patience = guard.early_stopping_validations
        return "halt" if patience is not None and state.validations_since_best >= patience else "keep"
    return "roll_back" if len(state.rollbacks) < guard.max_rollbacks else "halt"


def max_executed_steps(guard: GuardConfig, num_iterations: int) -> int:
    """The step budget, replays included."""
    return int(guard.max_step_budget_ratio * num_iterations)


DECISION_FIELDS = {
    *("attempt", "data_stream", "learning_rate_factor", "checkpoint"),
    *("executed_steps", "num_skipped", "rollbacks"),
}


class DecisionFile:
    """The last rollback that was decided, on disk before anything is done about it.

    A run that dies in between finds it on resume: a decision of a later attempt than the newest checkpoint's is still
    to be carried out. The file holds its own checksum (those of older versions had none). A damaged one is passed over,
    and `report` told, where the newest checkpoint comes from a rollback: that was the decision, or one before it, and
    the same steps then lead to the same verdict again.
    """

    def __init__(self, path: Path, *, report: Callable[[str], object]) -> None:
        self.path = path
        self._report = report

    def write(self, recipe: Recipe, checkpoint: str, state: LoopState) -> None:
        data = {
            "attempt": recipe.attempt,
            "data_stream": recipe.data_stream,
            "learning_rate_factor": recipe.learning_rate_factor,
            "checkpoint": checkpoint,
            "executed_steps": state.executed_steps,
            "num_skipped": state.num_skipped,
            "rollbacks": state.rollbacks,
        }
        assert data.keys() == DECISION_FIELDS
        atomic.write_json(self.path, data | {"checksum": atomic.sha256_json(data)})

    def pending(self, newest_attempt: int) -> dict[str, Any] | None:
        """The decision that the checkpoints do not show yet.

        Raises CheckpointError where the file is damaged and no checkpoint shows a rollback.
        """
        if not self.path.exists():
            return None
        data = self._read()
        if data is not None:
            return data if data["attempt"] > newest_attempt else None
        if newest_attempt == 1:
            raise CheckpointError(
                f"{self.path} is damaged: it holds a rollback that was decided and not carried out; restore it from a"
                " backup, or delete it, and the run repeats the steps since its newest checkpoint and judges them again"
            )
        self._report(f"{self.path} is damaged and passed over: attempt {newest_attempt} is under way")
        return None

    def _read(self) -> dict[str, Any] | None:
        """What the file holds, or None where that is not what was written."""
        try:
            data = atomic.read_json(self.path)
        except (ValueError, RecursionError):
            return None
        if not isinstance(data, dict):
            return None
        checksum = data.pop("checksum", None)
        is_whole = data.keys() == DECISION_FIELDS and checksum in (None, atomic.sha256_json(data))
        return data if is_whole and isinstance(data["attempt"], int) else None
