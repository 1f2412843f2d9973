"""What a run tells while it goes: each listener is called with every event and turns it into its own form.

The text log and TensorBoard are written by the trainer alone; the display is for whoever started it in the foreground.
Foreign text is printable in all of them. None of them may fail the run: where the disk is full, a line of theirs is
lost and the run's own files tell the error.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event as TensorBoardEvent
from tensorboardX.summary import scalar

from cvm_translator.config.schema import LoggingConfig
from cvm_translator.runs.rotation import QuietRotatingHandler, rotate_copy
from cvm_translator.runs.text import printable

Event = dict[str, Any]


def _describe_utilisation(event: Event) -> str:
    share = event.get("utilisation")
    return f"  {share:.0%} of peak" if share is not None else ""


def _describe_losses(event: Event) -> str:
    """Of a progress event; where every batch since the last one was skipped there are none."""
    if event["loss"] is None:
        return "loss -"
    parts = ""
    if event["distillation_loss"]:  # without a teacher the task loss is the whole loss
        parts = f" (distillation {event['distillation_loss']:.3f}, task {event['task_loss']:.3f})"
    return f"loss {event['loss']:.3f}{parts}"


def _describe_fact(name: str, value: Any) -> str:
    """One entry of a stage's summary."""
    if name.endswith("_bytes"):
        return f"{name.removesuffix('_bytes')} {value / 2**20:.1f} MiB"
    if name == "passed":
        return "passed" if value else "FAILED"
    shown = f"{value:,}" if isinstance(value, int) else value
    return f"{name.replace('_', ' ')} {shown}"


def _describe_quality(event: Event) -> str:
    """Of a validation; the teacher, while it is trained, has none to be measured by."""
    quality = event.get("quality_score")
    if quality is None or not event.get("teacher_scores"):
        return ""
    return f"quality {quality:.3f} of the teacher's"


def describe_event(event: Event) -> str | None:
    """One line of printable text for an event worth a line, else None."""
    line = _describe(event)
    return None if line is None else printable(line)


def _describe(event: Event) -> str | None:
    kind, step, stage = event["kind"], event.get("step"), event.get("stage")
    if kind == "stage_started":
        return f"stage {stage}"
    if kind == "stage_finished":
        how = "reused" if event["skipped"] else f"done in {event['seconds']:.1f} s"
        facts = ", ".join(_describe_fact(name, value) for name, value in (event.get("summary") or {}).items())
        return f"stage {stage}: {how}" + (f" ({facts})" if facts else "")
    if kind == "progress":
        return (
            f"{stage} step {step}/{event['num_iterations']}  {event['steps_per_second']:.1f} steps/s"
            f"  {event['tokens_per_second']:.0f} tokens/s{_describe_utilisation(event)}"
            f"  {format_seconds(event['eta_seconds'])} left  {_describe_losses(event)}"
        )
    if kind == "validation":
        scores = "  ".join(f"{name} {value:.2f}" for name, value in event["scores"].items())
        return "  ".join(filter(None, (f"{stage} validation at step {step}: {scores}", _describe_quality(event))))
    if kind == "verdict":
        return f"{stage} verdict at step {step}: {event['verdict']} -> {event['action']} ({event['reason']})"
    if kind == "checkpoint":
        return f"{stage} checkpoint {event['path']}" + (" (best)" if event["is_best"] else "")
    if kind == "rollback":
        return (
            f"ROLLBACK {event['rollback_number']} from step {event['from_step']} to {event['to_step']}:"
            f" {event['reason']}; from now on data order {event['data_stream']},"
            f" learning rate x {event['learning_rate_factor']:g}"
        )
    if kind == "warning":
        return f"warning: {event['message']}"
    if kind == "resumed":
        exact = "bit-exact" if event["exact"] else f"NOT bit-exact ({'; '.join(event['differences'])})"
        return f"{stage} resumed at step {step}, {exact}"
    if kind == "control":
        return f"request {event['id']} ({event['action']}): {event['result']}, {event['message']}"
    if kind == "paused":
        return f"{stage} paused after step {step}: {event['reason']}"
    if kind == "continued":
        return f"{stage} goes on after step {step}"
    if kind in ("stopped", "failed"):
        reason = f", {event['reason']}" if event.get("reason") else ""
        return f"{kind}: {event.get('message') or 'by signal ' + str(event.get('signal'))}{reason}"
    if kind == "run_finished":
        passed = "gate passed" if event["gate_passed"] else "GATE FAILED"
        return f"run finished: {passed}" + (" (halted)" if event["halted"] else "")
    return None


def format_seconds(seconds: float) -> str:
    """1:02:03, or 2:03 below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class TextLog:
    """logs/train.log: a line for each event but the single steps, with the time in UTC.

    It rotates by size; at every heartbeat the log of the background process beside it is looked at as well.
    """

    def __init__(self, path: Path, settings: LoggingConfig | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        settings = settings or LoggingConfig()
        self._limits = (round(settings.max_mib * 2**20), settings.backups)
        self._daemon_log = path.with_name("daemon.log")
        max_bytes, num_backups = self._limits
        self._handler = QuietRotatingHandler(
            path, maxBytes=max_bytes, backupCount=num_backups, encoding="utf-8", errors="backslashreplace"
        )
        formatter = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        formatter.converter = time.gmtime
        self._handler.setFormatter(formatter)
        self._logger = logging.Logger("cvm_translator.run")
        self._logger.addHandler(self._handler)

    def __call__(self, event: Event) -> None:
        if event["kind"] == "progress":
            rotate_copy(self._daemon_log, *self._limits)
        line = describe_event(event)
        if line is None:
            return
        is_bad = event["kind"] in ("warning", "rollback", "failed")
        self._logger.log(logging.WARNING if is_bad else logging.INFO, line)

    def note(self, message: str) -> None:
        self._logger.info(printable(message))

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._handler.close()


class TensorBoardLog:
    """tensorboard/: the scalars of every 10th step and of each validation.

    Written at once and in this thread: the usual SummaryWriter hands them to another, and once that has died of a full
    disk it blocks its caller for ever.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(directory / "events"), f".{os.getpid()}")

    def __call__(self, event: Event) -> None:
        kind, step, stage = event["kind"], event.get("step") or 0, event.get("stage")
        if kind == "train" and step % 10 == 0:
            for name in ("loss", "distillation_loss", "task_loss", "accuracy", "learning_rate", "grad_norm"):
                value = event[name]
                if isinstance(value, float) and math.isfinite(value):
                    self._add(f"{stage}/{name}", value, step)
        elif kind == "validation":
            for name, value in event["scores"].items():
                self._add(f"{stage}_validation/{name}", value, step)
            if event.get("quality_score") is not None:
                self._add(f"{stage}_validation/quality_score", event["quality_score"], step)
        if kind in ("progress", "validation"):
            with contextlib.suppress(OSError):
                self._writer.flush()

    def _add(self, tag: str, value: float, step: int) -> None:
        with contextlib.suppress(OSError):
            self._writer.write_event(TensorBoardEvent(wall_time=time.time(), step=step, summary=scalar(tag, value)))

    def note(self, message: str) -> None:
        pass

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._writer.close()


# Checkpoints are many; the end of a run is told by the command that ran it, in its own last line.
_TOLD_ELSEWHERE = ("checkpoint", "failed", "stopped")


class PlainDisplay:
    """One line an event on standard error, progress at most every quarter of a minute: for pipes and log files."""

    def __init__(self) -> None:
        self._last_progress = 0.0

    def __call__(self, event: Event) -> None:
        line = describe_event(event)
        if line is None or event["kind"] in _TOLD_ELSEWHERE:
            return
        if event["kind"] == "progress":
            if time.monotonic() - self._last_progress < 15.0:
                return
            self._last_progress = time.monotonic()
        print(line, file=sys.stderr, flush=True)

    def note(self, message: str) -> None:
        print(printable(message), file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class LiveDisplay:
    """A progress bar for the running loop under the lines of what happened; losses and quality stand below the bar."""

    def __init__(self, console: Any = None) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(bar_width=20),
            TextColumn("{task.completed:,}/{task.total:,}"),
            TextColumn("{task.fields[speed]}"),
            console=self._console,
            auto_refresh=False,
        )
        self._task: Any = None
        self._stage: str | None = None
        self._losses = self._quality = ""
        self._last_update = 0.0
        self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=4, transient=True)
        self._live.start()

    def _render(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        if self._task is None:
            return Text("")
        below = "  ".join(text for text in (self._losses, self._quality) if text)
        return Group(self._progress, Text(below or "measuring", style="dim"))

    def __call__(self, event: Event) -> None:
        kind = event["kind"]
        if kind == "train":
            if self._task is not None and time.monotonic() - self._last_update > 0.25:
                self._last_update = time.monotonic()
                self._progress.update(self._task, completed=event["step"])
            return
        if kind == "progress":
            self._show(event)
            return
        if kind == "validation":
            self._quality = _describe_quality(event)
        if kind in ("stage_started", "stage_finished", "failed", "stopped"):
            self._clear()
        line = describe_event(event)
        if line is not None and kind not in _TOLD_ELSEWHERE:
            self._print(line, _STYLES.get(kind, ""))

    def _show(self, event: Event) -> None:
        if self._task is None or self._stage != event["stage"]:
            self._clear()
            self._stage = event["stage"]
            self._task = self._progress.add_task(printable(event["stage"]), total=event["num_iterations"], speed="")
        speed = f"{event['steps_per_second']:.1f} steps/s  {format_seconds(event['eta_seconds'])} left"
        self._losses = _describe_losses(event)
        self._progress.update(self._task, completed=event["step"], speed=speed)

    def _clear(self) -> None:
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task, self._stage, self._losses, self._quality = None, None, "", ""

    def note(self, message: str) -> None:
        self._print(printable(message), "dim")

    def _print(self, line: str, style: str) -> None:
        from rich.text import Text

        self._console.print(Text(line, style=style))

    def close(self) -> None:
        self._clear()
        self._live.stop()


_STYLES = {"warning": "yellow", "rollback": "bold red", "failed": "bold red", "run_finished": "bold"}


def build_display() -> PlainDisplay | LiveDisplay:
    """The live display on a terminal, plain lines elsewhere."""
    return LiveDisplay() if sys.stderr.isatty() else PlainDisplay()
