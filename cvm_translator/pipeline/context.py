"""What all stages of one run share, and how a stage announces and records itself."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cvm_translator.config import RunConfig
from cvm_translator.runs import atomic
from cvm_translator.runs.control import ControlFile
from cvm_translator.runs.events import EventWriter
from cvm_translator.runs.heartbeat import Heartbeat
from cvm_translator.runs.layout import RunLayout
from cvm_translator.training.signals import StopRequest


@dataclass
class RunContext:
    """One run in progress; its holder owns the run's lock."""

    config: RunConfig
    layout: RunLayout
    events: EventWriter
    stop: StopRequest
    device: torch.device
    show: Callable[[str], None]
    """Shows a line of text in the log and to whoever watches."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    control: ControlFile | None = None
    """What observers ask for, if anybody can."""

    def warn(self, code: str, message: str) -> None:
        self.events.write("warning", code=code, message=message)

    def note(self, message: str) -> None:
        """For parts that tell what they do in lines of text; the log and the display show them."""
        self.beat()
        self.show(message)

    def beat(self, phase: str = "stage") -> None:
        """Give a sign of life between two pieces of a stage's work."""
        self.heartbeat.beat(phase)

    def go_on(self, phase: str = "stage") -> None:
        """Between two pieces of long work that may be left at any time: a sign of life, unless a stop was asked for."""
        self.beat(phase)
        self.stop.raise_if_requested()


@dataclass
class StageNote:
    """What a stage tells of itself when it ends."""

    skipped: bool = False
    summary: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def stage(context: RunContext, name: str) -> Iterator[StageNote]:
    """Announce the start and the end of a stage; the body fills in the note."""
    context.stop.raise_if_requested()
    context.events.write("stage_started", stage=name)
    context.heartbeat.beat("stage", stage=name, step=0)
    start = time.monotonic()
    note = StageNote()
    yield note
    context.beat()
    seconds = time.monotonic() - start
    context.events.write("stage_finished", stage=name, seconds=seconds, skipped=note.skipped, summary=note.summary)


class StageRecord:
    """The completion record of one stage: the hash of its inputs, its outputs' hashes and its result.

    A record written last and atomically is what makes a rerun skip the stage; one that is damaged, has other inputs, or
    names an output that has changed, counts for nothing.
    """

    def __init__(self, layout: RunLayout, name: str, inputs: Any) -> None:
        self._root = layout.root
        self._path = layout.stages / f"{name}.json"
        self._inputs = atomic.sha256_json(inputs)

    def load(self) -> dict[str, Any] | None:
        """The stage's result if it is complete and its outputs are intact."""
        try:
            data = atomic.read_json(self._path)
            inputs, outputs, result = data["inputs"], dict(data["outputs"]), dict(data["result"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        if inputs != self._inputs:
            return None
        for name, digest in outputs.items():
            path = self._root / name
            if not path.exists() or atomic.sha256_file(path) != digest:
                return None
        return result

    def save(self, result: dict[str, Any], outputs: list[Path]) -> None:
        digests = {str(path.relative_to(self._root)): atomic.sha256_file(path) for path in outputs}
        atomic.write_json(self._path, {"inputs": self._inputs, "outputs": digests, "result": result})
