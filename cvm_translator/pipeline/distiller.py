"""A whole run: corpus, tokenizer, teacher, distillation under the guard, quantised student, gate, report.

`ModelDistiller(config).run_distillation()` is the product's main entry; the command line calls the same code. A run
folder has one holder at a time, belongs to one config, and is taken up where it was: every stage that is complete and
intact is skipped, and the loops resume bit for bit from their newest valid checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pydantic
import yaml

from cvm_translator.config import RunConfig, dump_config
from cvm_translator.errors import (
    EXIT_GATE_FAILED,
    EXIT_OK,
    CvmError,
    NoRoomError,
    RunFolderError,
    Stopped,
    is_full_disk,
)
from cvm_translator.metrics import require_libraries
from cvm_translator.pipeline import delivery
from cvm_translator.pipeline.cards import describe_outcome
from cvm_translator.pipeline.context import RunContext
from cvm_translator.pipeline.journal import TensorBoardLog, TextLog, build_display
from cvm_translator.pipeline.student import distil
from cvm_translator.pipeline.teacher import check_given_teacher, obtain_teacher
from cvm_translator.pipeline.text import build_corpus, build_tokenizer
from cvm_translator.runs import atomic
from cvm_translator.runs.control import ControlFile, Request
from cvm_translator.runs.events import EventWriter
from cvm_translator.runs.heartbeat import Heartbeat
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.lock import RunLock
from cvm_translator.training.device import build_device, configure_threads, describe_environment
from cvm_translator.training.signals import StopRequest

STAGES = ("corpus", "tokenizer", "teacher", "distil", "quantise", "gate", "report")

# Settings that may differ when a run folder is taken up again: they change no number, or (threads) are announced.
_FREE_SETTINGS = ("output_dir", "tensorboard", "logging", "num_threads")


class ModelDistiller:
    """Runs one config in one run folder.

    Raises `CvmError` for what the user can mend, `Stopped` when a signal or `stop` asked the run to save and leave.
    With `progress`, what happens is told on standard error as it does.
    """

    def __init__(self, config: RunConfig, *, progress: bool = True, heartbeat: Heartbeat | None = None) -> None:
        self.config = config
        self.layout = RunLayout(Path(config.output_dir))
        self._progress = progress
        self._heartbeat = heartbeat or Heartbeat()

    def run_distillation(self) -> dict[str, Any]:
        """Run or carry on, to the final report (what `reports/final_report.json` holds, and the run's `exit_code`)."""
        is_supervised = self._heartbeat.is_supervised
        with (
            _explained_full_disk(self.layout.root),
            RunLock(self.layout.lock),
            StopRequest(is_supervised=is_supervised) as stop,
        ):
            self._heartbeat.on_gone = stop.supervisor_is_gone
            context = self._open(stop)
            try:
                require_libraries(self.config.validation.metrics)
                check_given_teacher(self.config)
                corpus = build_corpus(context)
                tokenizer = build_tokenizer(context, corpus)
                teacher = obtain_teacher(context, corpus, tokenizer)
                outcome = distil(context, corpus, tokenizer, teacher)
                folders = delivery.quantise(context, corpus, tokenizer, teacher, outcome)
                verdict = delivery.gate(context, corpus, teacher, folders)
                report = delivery.report(context, corpus, outcome, folders, verdict)
                return self._finish(context, report)
            except Stopped as stopped:
                context.events.write("stopped", signal=stopped.signal_number, reason=stop.reason)
                raise
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
                with contextlib.suppress(OSError):  # a full disk must not hide the error itself
                    if is_supervised and (not isinstance(error, CvmError) or is_full_disk(error)):
                        context.warn("crashed", message)  # it has failed only when the supervisor says so
                    else:
                        context.events.write("failed", message=message)
                raise
            finally:
                self._close(context)

    # ------------------------------------------------------------------------------------------------------ lifecycle

    def _open(self, stop: StopRequest) -> RunContext:
        self._claim_folder()
        device = build_device(self.config.device)
        num_threads = self.config.num_threads or self._recorded_num_threads()
        configure_threads(num_threads, device, deterministic=self.config.deterministic)
        run_id = self._write_environment(describe_environment(device))
        control = ControlFile(self.layout.control)
        stale = control.begin(self.layout.events, is_restart=self._heartbeat.num_restarts > 0)
        events = EventWriter(self.layout.events)
        self._listeners: list[Any] = [TextLog(self.layout.train_log, self.config.logging)]
        if self.config.tensorboard:
            self._listeners.append(TensorBoardLog(self.layout.tensorboard))
        if self._progress:
            self._listeners.append(build_display())
        events.listeners.extend(self._listeners)
        self._start = time.monotonic()
        events.write(
            "run_started",
            run_id=run_id,
            pid=os.getpid(),
            num_iterations=self.config.distillation.num_iterations,
            stages=list(STAGES),
            config_sha256=atomic.sha256_file(self.layout.config),
        )
        self._heartbeat.beat("begun")
        _decline(events, stale, "stale", "it was asked for before this start")
        return RunContext(self.config, self.layout, events, stop, device, self._show, self._heartbeat, control)

    def _claim_folder(self) -> None:
        """Write the config into a new folder; refuse a folder in which another config has trained something.

        Until then a config may be mended: a start that failed for a wrong setting does not stand in the way.
        """
        path = self.layout.config
        if path.exists() and self._has_trained():
            difference = _first_difference(_fill_in(_read_config(path)), self.config.to_plain())
            if difference is not None:
                raise RunFolderError(
                    f"{self.layout.root} holds a run with another config ({difference}): "
                    "choose another --output-dir, or move the old folder away"
                )
        else:
            atomic.write_text(path, dump_config(self.config))

    def _has_trained(self) -> bool:
        layout = self.layout
        return any(place.exists() for place in (layout.teacher, layout.checkpoints, layout.stages))

    def _recorded_num_threads(self) -> int | None:
        """The thread count with which this folder's run began: a resume with another would not be bit-exact."""
        if not self._has_trained():
            return None
        num_threads: int | None = self._read_environment().get("numerics", {}).get("num_threads")
        return num_threads

    def _write_environment(self, environment: dict[str, Any]) -> str:
        run_id: str = self._read_environment().get("run_id") or uuid.uuid4().hex
        atomic.write_json(self.layout.environment, {"run_id": run_id} | environment)
        return run_id

    def _read_environment(self) -> dict[str, Any]:
        """What an earlier start wrote; nothing where it is absent or damaged (checkpoints say what must be equal)."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            data = atomic.read_json(self.layout.environment)
            return data if isinstance(data, dict) else {}
        return {}

    def _finish(self, context: RunContext, report: dict[str, Any]) -> dict[str, Any]:
        passed = report["gate"]["passed"]
        if context.control is not None:
            _decline(context.events, context.control.poll(), "late", "the training is over")
        report["exit_code"] = EXIT_OK if passed else EXIT_GATE_FAILED
        for failure in report["gate"]["failures"]:
            context.warn("gate_failed", f"gate: {failure}")
        context.events.write(
            "run_finished",
            step=report["num_iterations"],
            exit_code=report["exit_code"],
            gate_passed=passed,
            halted=report["halted"],
            executed_steps=report["executed_steps"],
            seconds=time.monotonic() - self._start,
        )
        context.events.flush()
        context.note(describe_outcome(report))
        context.note(f"report: {context.layout.reports / 'comparison_report.html'}")
        return report

    def _show(self, message: str) -> None:
        for listener in self._listeners:
            listener.note(message)

    def _close(self, context: RunContext) -> None:
        with contextlib.suppress(OSError):  # every event was written when it mattered
            context.events.close()
        for listener in self._listeners:
            listener.close()


def _decline(events: EventWriter, requests: Iterable[Request], result: str, message: str) -> None:
    """Answer requests that are not obeyed."""
    for request in requests:
        events.write("control", id=request.id, action=request.action, result=result, message=message)


@contextlib.contextmanager
def _explained_full_disk(root: Path) -> Iterator[None]:
    """Turn a write that found no room into the line that says what to do."""
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise NoRoomError(
            f"no room in {root} ({error.strerror}): free some space and run the same command again;"
            " it goes on from the last checkpoint"
        ) from error


def _read_config(path: Path) -> Any:
    """The config that a run folder holds, as plain data."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RunFolderError(
            f"{path} cannot be read as YAML ({error}): restore it, or delete it and run the same config again"
        ) from None


def _fill_in(config: Any) -> Any:
    """The config with the defaults of settings that an older version did not have; as it is where that is no config."""
    with contextlib.suppress(pydantic.ValidationError):
        return RunConfig.model_validate(config).to_plain()
    return config


def _first_difference(old: Any, new: Any, prefix: str = "") -> str | None:
    """The first setting on which two plain configs differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            if not prefix and key in _FREE_SETTINGS:
                continue
            difference = _first_difference(old.get(key), new.get(key), f"{prefix}{key}.")
            if difference is not None:
                return difference
        return None
    return None if old == new else f"{prefix.rstrip('.')}: was {old!r:.60}, is {new!r:.60}"


def run_pipeline(config: RunConfig, *, progress: bool = True, heartbeat: Heartbeat | None = None) -> dict[str, Any]:
    """What the commands `run` and `resume` call."""
    return ModelDistiller(config, progress=progress, heartbeat=heartbeat).run_distillation()
