"""A trainer in small: the real lock, events, heartbeat and signals; it has no model, and misbehaves when told to."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cvm_translator.daemon.pulse import Patience
from cvm_translator.daemon.supervisor import Rules, Supervisor
from cvm_translator.runs.events import EventTail, read_events
from cvm_translator.runs.layout import RunLayout

TRAINER = """
import os, signal, sys, threading, time
from pathlib import Path
from cvm_translator.errors import CvmError
from cvm_translator.runs.events import EventWriter
from cvm_translator.runs.heartbeat import Heartbeat
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.lock import RunLock

layout, plan = RunLayout(Path(sys.argv[1])), sys.argv[2].split(",")
heartbeat = Heartbeat.from_environment()
act = plan[min(heartbeat.num_restarts, len(plan) - 1)]
asked, gone = [], threading.Event()
def note(number, _):
    if asked:
        os._exit(128 + number)
    asked.append(number)
signal.signal(signal.SIGTERM, note)
signal.signal(signal.SIGINT, note)
signal.signal(signal.SIGHUP, lambda *_: gone.set())
heartbeat.on_gone = gone.set
if act == "full":
    sys.exit(72)
if act == "early":
    print("error: corpus.train[0].path: no such file", file=sys.stderr)
    sys.exit(1)
try:
    with RunLock(layout.lock), EventWriter(layout.events) as events:
        events.write("run_started", pid=os.getpid(), restarts=heartbeat.num_restarts)
        heartbeat.beat("begun")
        heartbeat.beat("stage", stage="distil", step=0)
        if act.startswith("stepless"):
            sys.exit(int(act[8:]))
        step = 0
        while True:
            heartbeat.beat("step", step=step)
            step += 1
            events.write("train", step=step, stage="distil")
            if step == 4:
                if act.startswith("exit"):
                    sys.exit(int(act[4:]))
                if act == "paused":
                    heartbeat.beat("paused")
                    os.kill(os.getpid(), 9)
                if act.startswith("kill"):
                    os.kill(os.getpid(), int(act[4:]))
                while act == "hang" and not asked:
                    time.sleep(0.02)
                if act == "deaf":
                    signal.signal(signal.SIGTERM, signal.SIG_IGN)
                    time.sleep(1000)
            if asked or gone.is_set():
                if act == "slow":
                    events.write("progress", step=step, stage="distil", saving=True)
                    time.sleep(1000)
                events.write("stopped", signal=(asked or [15])[0], step=step, gone=gone.is_set())
                sys.exit(128 + (asked or [15])[0])
            time.sleep(0.01)
except CvmError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
"""

QUICK = Rules(first_delay_seconds=0.01, grace_seconds=0.5, room_seconds=0.0, tick_seconds=0.1)
IMPATIENT = dataclasses.replace(QUICK, patience=Patience(step=1.0))


def trainer_command(run_dir: Path, plan: str) -> list[str]:
    """`plan` names what each start of the trainer does at step 4, the last one for all that follow."""
    return [sys.executable, "-c", TRAINER, str(run_dir), plan]


@dataclasses.dataclass
class Bench:
    """A run folder with a supervised trainer in small."""

    run_dir: Path
    pids: list[int] = dataclasses.field(default_factory=list)
    rules: Rules = QUICK
    impatient: Rules = IMPATIENT

    @property
    def layout(self) -> RunLayout:
        return RunLayout(self.run_dir)

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.layout.events) if not kinds or event["kind"] in kinds]

    def restarts(self) -> list[dict[str, Any]]:
        return [event for event in self.events("warning") if event["code"] == "restart"]

    def supervise(self, plan: str, rules: Rules | None = None, **options: Any) -> int:
        """Supervise in this process, to the end."""
        command = trainer_command(self.run_dir, plan)
        return Supervisor(self.layout, command, command, rules=rules or self.rules, **options).run()

    def start(self, plan: str, **environment: str) -> subprocess.Popen[bytes]:
        """Supervise in a process of its own."""
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import conftest; from pathlib import Path;"
            "sys.exit(conftest.Bench(Path(sys.argv[2])).supervise(sys.argv[3]))"
        )
        command = [sys.executable, "-c", code, str(Path(__file__).parent), str(self.run_dir), plan]
        process = subprocess.Popen(command, env=os.environ | environment)
        self.pids.append(process.pid)
        return process

    def wait_for(self, is_reached: Callable[[dict[str, Any]], bool], seconds: float = 60.0) -> dict[str, Any]:
        """The first event for which `is_reached` says yes."""
        tail = EventTail(self.layout.events)
        deadline = time.monotonic() + seconds
        try:
            while time.monotonic() < deadline:
                for event in tail.poll():
                    if is_reached(event):
                        return event
                time.sleep(0.01)
        finally:
            tail.close()
        raise AssertionError(f"not reached: {self.events()[-5:]}")

    def meanwhile(self, act: Callable[[], object]) -> threading.Thread:
        """Let a thread of this process act on what the events tell."""
        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        return thread


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Bench]:
    """Ends every process that the test left, the trainers too."""
    bench = Bench(tmp_path / "run")
    yield bench
    pids = [*bench.pids, *(event["pid"] for event in bench.events("run_started"))]
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
