"""A small run under its supervisor (`start --foreground`), started by a benchmark and followed by its events."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from benchmarks.common import Arm, BenchmarkError
from cvm_translator.runs.events import EventTail
from cvm_translator.runs.lock import read_holder

TIMEOUT_SECONDS = 600.0

Event = dict[str, Any]


class SupervisedRun:
    """A context: the supervisor starts with it, and is asked to save and leave at its end."""

    def __init__(
        self, arm: Arm, command: Sequence[str] | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """`command`: another supervisor than the product's own; `environment`: variables beside this process's."""
        self.arm = arm
        self.events: list[Event] = []
        self.tail = EventTail(arm.layout.events)
        self.log = arm.layout.logs / "daemon.log"
        arm.layout.logs.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command or [*arm.command("start"), "--foreground", "--no-progress"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
            )

    def follow(self) -> list[Event]:
        """The new events."""
        new = self.tail.poll()
        self.events += new
        return new

    def wait_for(self, is_reached: Callable[[Event], bool]) -> Event:
        """Follow until an event for which `is_reached` says yes."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            has_ended = self.process.poll() is not None
            found = next(filter(is_reached, self.follow()), None)
            if found is not None:
                return found
            if has_ended:
                raise BenchmarkError(f"the run ended ({self.process.returncode}): see {self.log}")
            time.sleep(0.02)
        raise BenchmarkError(f"what was waited for did not come in {TIMEOUT_SECONDS:.0f} s: see {self.log}")

    def wait_for_save(self, step: int) -> Event:
        """Follow until a checkpoint of this step or a later one."""
        return self.wait_for(lambda event: event["kind"] == "checkpoint" and event["step"] >= step)

    def find(self, kind: str, code: str | None = None) -> list[Event]:
        """The events of a kind (and code) so far."""
        return [event for event in self.events if event["kind"] == kind and (code is None or event["code"] == code)]

    @property
    def trainer(self) -> int:
        """Process id of the trainer."""
        holder = read_holder(self.arm.layout.lock)
        if holder is None:
            raise BenchmarkError(f"nobody holds {self.arm.folder}: see {self.log}")
        return int(holder["pid"])

    def close(self) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGTERM)
        self.process.wait(TIMEOUT_SECONDS)
        self.follow()
        self.tail.close()

    def __enter__(self) -> SupervisedRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
