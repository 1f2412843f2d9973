"""A loop's whole state as a checkpoint, and back: what is captured here and restored here is the same list.

Guarantees: a loop restored from a checkpoint goes on bit for bit as the one that saved it would have; a missing piece
is an error. What the last bits depend on beside the state (torch build, thread count, ...) is compared and returned.
"""

from __future__ import annotations

from typing import Any

import torch

from cvm_translator.checkpoints.folder import LoadedCheckpoint
from cvm_translator.checkpoints.store import CheckpointStore, checkpoint_name
from cvm_translator.errors import CheckpointError
from cvm_translator.training.device import describe_numerics
from cvm_translator.training.optimizer import MovingAverage
from cvm_translator.training.setup import LoopOutcome, LoopSetup
from cvm_translator.training.spikes import SpikeWindow
from cvm_translator.training.state import LoopState, capture_random_state, restore_random_state

START = checkpoint_name(0, 1)
"""The rollback target until there is a best checkpoint."""


def capture(
    setup: LoopSetup,
    state: LoopState,
    optimizer: torch.optim.Optimizer,
    average: MovingAverage | None,
    spikes: SpikeWindow,
) -> dict[str, Any]:
    """Everything that changes while a loop runs, as the keyword arguments of `CheckpointStore.save`."""
    tensors = {"model": setup.model.state_dict()}
    if average is not None:
        tensors["ema"] = average.tensors
    plain = {
        "loop": state.to_plain(),
        "batches": setup.batches.state_dict(),
        "judge": setup.judge.state_dict(),
        "spikes": spikes.state_dict(),
        "num_averaged": average.num_updates if average else None,
        "numerics": _describe_numerics(setup),
    }
    torch_states = {"optimizer": optimizer.state_dict(), "random": capture_random_state()}
    return {"tensors": tensors, "torch_states": torch_states, "plain": plain}


def restore(
    checkpoint: LoadedCheckpoint,
    setup: LoopSetup,
    optimizer: torch.optim.Optimizer,
    average: MovingAverage | None,
    spikes: SpikeWindow,
) -> tuple[LoopState, list[str]]:
    """Put every piece back, the thread count too unless the config sets one.

    Returns the loop's state and what differs from the machine that saved it.
    """
    plain = checkpoint.plain
    setup.model.load_state_dict(checkpoint.tensors["model"])
    optimizer.load_state_dict(checkpoint.torch_states["optimizer"])
    if average is not None:
        average.load_tensors(checkpoint.tensors["ema"], plain["num_averaged"])
    state = LoopState.from_plain(plain["loop"])
    try:
        setup.batches.load_state_dict(plain["batches"])
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.path}: {error}: move {setup.store.directory} away to train again, or finish the run with the"
            " version and the corpus that began it"
        ) from error
    setup.judge.load_state_dict(plain["judge"])
    spikes.load_state_dict(plain["spikes"])
    restore_random_state(checkpoint.torch_states["random"])
    old = plain["numerics"]
    if setup.num_threads is None:
        torch.set_num_threads(old["num_threads"])
    now = _describe_numerics(setup)
    return state, [f"{key}: was {old[key]}, is {now.get(key)}" for key in old if old[key] != now.get(key)]


def _describe_numerics(setup: LoopSetup) -> dict[str, Any]:
    """What the last bits depend on: the machine, and how steps are computed there."""
    own = {"grad_accum_steps": setup.settings.grad_accum_steps, "compiled": setup.is_compiled}
    return describe_numerics(setup.device) | own


def load_best(setup: LoopSetup, name: str) -> LoadedCheckpoint:
    """Load the best checkpoint by its name; where it is damaged, the newest valid one that was a best in its time.

    Raises CheckpointError, with what to do, when there is none.
    """
    try:
        return setup.store.load(name)
    except CheckpointError as error:
        damage = str(error)
    for other in setup.store.names():
        try:
            loaded = setup.store.load(other)
        except CheckpointError:
            continue
        if loaded.is_best or other == START:
            setup.events.write(
                "warning",
                step=loaded.step,
                attempt=loaded.attempt,
                code="checkpoint",
                message=f"{damage}: {other} is used in its place",
            )
            return loaded
    raise CheckpointError(
        f"{damage}, and there is no older best to use in its place: restore it from a backup,"
        f" or move {setup.store.directory} away to train again"
    )


def delivered_weights(store: CheckpointStore, outcome: LoopOutcome) -> dict[str, torch.Tensor]:
    """The state_dict of the model to deliver, read back and verified; averaged weights where averaging is on."""
    tensors = store.load(outcome.final_checkpoint).tensors
    return tensors["model"] | tensors.get("ema", {})
