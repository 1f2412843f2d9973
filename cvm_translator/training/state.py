"""Everything that a resumed run needs to go on bit for bit, gathered into a checkpoint and put back from one."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass
class LoopState:
    """Where a loop stands, in plain data; saved whole in each checkpoint."""

    step: int = 0
    """Optimizer steps in the model's own history."""
    executed_steps: int = 0
    """Steps run in all, with rejected batches and the steps that a rollback undid."""
    attempt: int = 1
    """Grows by one with each rollback."""
    learning_rate_factor: float = 1.0
    data_stream: int = 0
    """Which of the endless orders of the data is being read."""
    num_skipped: int = 0
    consecutive_skips: int = 0
    best_step: int | None = None
    best_checkpoint: str | None = None
    validations_since_best: int = 0
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    width_index: int = 0
    """Where in its course of bit widths the loop is."""
    held: dict[str, Any] | None = None
    """Checkpoint and bits of the width before: its quality was held, and it is delivered if this one's is not."""
    halted: str | None = None
    """Why the loop ended before its last step, if it did."""
    is_unjudged: bool = False
    """Whether the validation of this step was left for a stop and is still to be made."""
    pending: dict[str, Any] | None = None
    """A translation whose scores are being computed while training goes on: step, attempt, bits, the step at which the
    verdict is due, and what was translated."""

    def to_plain(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_plain(cls, data: dict[str, Any]) -> LoopState:
        """Raises TypeError or KeyError where a piece is missing or foreign: an incomplete state is an error."""
        missing = {item.name for item in dataclasses.fields(cls)} - data.keys() - _LATER_FIELDS
        if missing:
            raise KeyError(f"the checkpoint's loop state lacks {sorted(missing)}")
        return cls(**data)


_LATER_FIELDS = {"is_unjudged", "pending"}
"""Absent from the checkpoints of older versions, which did what the default says."""


def capture_random_state() -> dict[str, Any]:
    """The state of every random generator of the process, as tensors and plain data."""
    python_version, python_words, python_gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [python_version, list(python_words), python_gauss],
        "numpy_key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
        "numpy_pos": int(numpy_state["state"]["pos"]),
        "numpy_has_gauss": int(numpy_state["has_gauss"]),
        "numpy_gauss": float(numpy_state["gauss"]),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what `capture_random_state` took."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(
        {
            "bit_generator": "MT19937",
            "state": {"key": state["numpy_key"].numpy().astype(np.uint32), "pos": state["numpy_pos"]},
            "has_gauss": state["numpy_has_gauss"],
            "gauss": state["numpy_gauss"],
        }
    )


def seed_everything(seed: int) -> None:
    """Start every random generator of the process from one seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
