"""What observers ask of a loop (see `runs.control`), obeyed between two steps and answered in the events.

None of it changes the course of the training: a checkpoint, a validation for the record (its draws of the random
generators are taken back) and a pause leave every later loss as it would have been, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cvm_translator.errors import Stopped
from cvm_translator.runs.control import ACTIONS, Request
from cvm_translator.training.state import capture_random_state, restore_random_state

if TYPE_CHECKING:
    from cvm_translator.training.loop import TrainingLoop

PAUSE_LOOK_SECONDS = 0.2


def obey_requests(loop: TrainingLoop) -> None:
    """Obey and answer what was asked for by now; returns when the loop may take its next step. Raises Stopped."""
    control = loop.setup.control
    if control is None:
        return
    for request in control.poll():
        obey = _ACTIONS.get(request.action)
        if obey is None:
            _answer(loop, request, "unknown", f"known actions are {', '.join(ACTIONS)}")
        else:
            obey(loop, request)
    problem = control.take_problem()
    if problem is not None:
        state = loop.state
        loop.setup.events.write("warning", step=state.step, attempt=state.attempt, code="control_file", message=problem)


def _answer(loop: TrainingLoop, request: Request, result: str, message: str) -> None:
    loop.setup.tell(loop.state, "control", id=request.id, action=request.action, result=result, message=message)


def _pause(loop: TrainingLoop, request: Request) -> None:
    """Save, then take no step until somebody asks to continue; other requests and signals are obeyed meanwhile."""
    setup, state = loop.setup, loop.state
    if loop.is_paused:
        _answer(loop, request, "done", "it was paused already")
        return
    loop.save_unless_saved()
    loop.is_paused = True
    _answer(loop, request, "done", f"paused after step {state.step}")
    setup.tell(state, "paused", reason="it was asked to")
    while loop.is_paused:
        setup.heartbeat.beat("paused")
        setup.stop.raise_if_requested()
        time.sleep(PAUSE_LOOK_SECONDS)
        obey_requests(loop)
    setup.tell(state, "continued")
    loop.progress.restart()


def _continue(loop: TrainingLoop, request: Request) -> None:
    message = f"goes on after step {loop.state.step}" if loop.is_paused else "it was not paused"
    loop.is_paused = False
    _answer(loop, request, "done", message)


def _checkpoint(loop: TrainingLoop, request: Request) -> None:
    loop.save_unless_saved()
    _answer(loop, request, "done", f"the checkpoint of step {loop.state.step} is saved")


def _validate(loop: TrainingLoop, request: Request) -> None:
    setup, state = loop.setup, loop.state
    setup.heartbeat.beat("validation")
    loop.progress.report(state)
    random = capture_random_state()
    try:
        setup.judge.observe(state, loop.validated_model(), setup.widths.widths[state.width_index])
    except Stopped:  # the loop saves and leaves as soon as this returns
        _answer(loop, request, "failed", "the run was asked to leave before the validation was over")
    except Exception as error:
        # Answered also where it ends the trainer: the next one must not run into the same again.
        _answer(loop, request, "failed", f"the validation failed: {error}")
        if not isinstance(error, OSError):
            raise
    else:
        _answer(loop, request, "done", f"step {state.step} is validated for the record")
    finally:
        restore_random_state(random)
    loop.progress.restart()


def _stop(loop: TrainingLoop, request: Request) -> None:
    # Answered first: a request that is not would be obeyed by the next start.
    _answer(loop, request, "done", f"saves and leaves after step {loop.state.step}")
    loop.setup.stop.request(reason="a request in control.json")


_ACTIONS: dict[str, Callable[[TrainingLoop, Request], None]] = {
    "pause": _pause,
    "continue": _continue,
    "checkpoint": _checkpoint,
    "validate": _validate,
    "stop": _stop,
}
