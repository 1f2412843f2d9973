"""Verdicts that come some steps after their validation, so that scores are computed while training goes on.

The model translates between two steps, as ever; what it said goes into that step's checkpoint and to the judge's
scoring process. The verdict is due a tenth of the distance between two validations later: if the scores are not there
by then, they are waited for. What depends on a verdict therefore never depends on how fast it came.

Guarantees: until the verdict, the validated checkpoint is kept; with a new best it becomes what it would be had the
verdict come at once. A pending verdict comes before whatever else needs it: the next validation, an emergency's
rollback, the end of the step budget. A loop that was stopped or killed meanwhile has the same text scored again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cvm_translator.checkpoints.folder import DiskFullError
from cvm_translator.checkpoints.store import checkpoint_name
from cvm_translator.errors import CheckpointError, Stopped
from cvm_translator.training.room import judge_with_room, with_room
from cvm_translator.training.setup import LoopSetup
from cvm_translator.training.state import LoopState

if TYPE_CHECKING:
    from cvm_translator.training.loop import TrainingLoop

DUE_AFTER = 0.1
"""Of the distance between two validations: what scoring may take of a run without ever being waited for."""


def count_steps_to_verdict(validate_every_steps: int) -> int:
    """From a validation to the verdict on it."""
    return max(1, int(DUE_AFTER * validate_every_steps))


def is_late(setup: LoopSetup, state: LoopState) -> bool:
    """Whether the verdict on this step may come later; on the last one there is nothing to be done meanwhile."""
    return setup.late is not None and setup.late.is_late and state.step < setup.settings.num_iterations


def is_verdict_due(state: LoopState) -> bool:
    return state.pending is not None and state.step >= state.pending["due"]


def pending_checkpoint(pending: dict[str, Any]) -> str:
    """The name of the checkpoint that awaits its verdict."""
    return checkpoint_name(pending["step"], pending["attempt"])


def translate(loop: TrainingLoop, bits: int) -> None:
    """Translate with the model of this step, save it, and have the scores computed."""
    setup, state, late = loop.setup, loop.state, loop.setup.late
    assert late is not None
    assert state.pending is None
    translated = loop.unless_stopped(lambda: late.translate(loop.validated_model(), bits))
    state.pending = {
        "step": state.step,
        "attempt": state.attempt,
        "due": state.step + count_steps_to_verdict(setup.validate_every_steps),
        "bits": bits,
        "translated": translated,
    }
    late.begin_scoring(translated)
    setup.store.protect(pending_checkpoint(state.pending))
    loop.save()


def take_up_scoring(loop: TrainingLoop) -> None:
    """After a resume: have the scores computed that the process before was waiting for."""
    setup, pending = loop.setup, loop.state.pending
    if pending is None:
        return
    assert setup.late is not None
    if is_verdict_due(loop.state):
        conclude(loop)
    elif setup.late.is_late:
        setup.late.begin_scoring(pending["translated"])


def conclude(loop: TrainingLoop) -> bool:
    """Act on the pending verdict, if there is one; whether the loop goes on from where it stands."""
    setup, state, late = loop.setup, loop.state, loop.setup.late
    pending = state.pending
    if pending is None:
        return True
    assert late is not None
    step, attempt, translated = pending["step"], pending["attempt"], pending["translated"]
    setup.heartbeat.beat("validation", stage=setup.stage, step=state.step, attempt=state.attempt)
    try:
        judgement = judge_with_room(setup, state, lambda: late.conclude(step, attempt, translated))
    except Stopped as stopped:
        loop.save_unless_saved()
        raise Stopped(stopped.signal_number) from None
    state.pending = None
    setup.store.unprotect(pending_checkpoint(pending))
    loop.act_on(judgement, step, pending["bits"])
    return loop.state is state and state.halted is None


def make_best(loop: TrainingLoop, name: str) -> None:
    """Put into the checkpoint what it would hold had the verdict come at once, and make it the best."""
    setup, state = loop.setup, loop.state

    def change(plain: dict[str, Any]) -> dict[str, Any]:
        best = {"best_step": state.best_step, "best_checkpoint": name, "validations_since_best": 0, "pending": None}
        return plain | {"loop": plain["loop"] | best, "judge": setup.judge.state_dict()}

    try:
        amended = with_room(setup, state, lambda: setup.store.amend(name, change))
    except DiskFullError:
        raise
    except CheckpointError as error:  # damaged since; a rollback would take an older best
        setup.tell(state, "warning", code="checkpoint", message=str(error))
        return
    setup.events.write(
        "checkpoint",
        step=state.best_step,
        attempt=state.attempt,
        stage=setup.stage,
        path=name,
        is_best=True,
        num_bytes=amended.num_bytes,
        seconds=amended.seconds,
    )
