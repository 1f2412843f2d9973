"""Starting a supervised run in the background, and asking a run to stop.

Guarantees: `start` and `resume` return only once the trainer holds the run's lock and has written its first event; if
it ends before that, its own one-line error and exit code are passed on. They begin a supervisor (see `supervisor`),
whose process id they return, and which begins the trainer. It leads a session of its own, so closing the terminal does
not end it; what both print is appended to `logs/daemon.log`.

`stop` signals only the process that holds the supervisor's lock now, or the run's own where nobody supervises it, on
this host, and whose start time is the recorded one: a process id that was reused is never signalled. It returns when
both locks are free, that is, when everything is saved.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cvm_translator.daemon.notify import VARIABLES
from cvm_translator.daemon.supervisor import Supervisor
from cvm_translator.errors import EXIT_ERROR, EXIT_GATE_FAILED, EXIT_NOT_RUNNING, EXIT_OK, CvmError, RunFolderError
from cvm_translator.runs.events import EventTail
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.lock import process_start_time, read_holder

START_TIMEOUT_SECONDS = 180.0
STOP_TIMEOUT_SECONDS = 120.0
_POLL_SECONDS = 0.05

PROGRAM = (sys.executable, "-m", "cvm_translator")


class StartError(CvmError):
    """The background process ended before its run began; carries its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class NotRunningError(CvmError):
    """Nobody holds the run folder."""

    exit_code = EXIT_NOT_RUNNING


def daemon_log(run_dir: Path) -> Path:
    """What the background process prints."""
    return RunLayout(run_dir).logs / "daemon.log"


def start(config_path: Path, overrides: list[str], output_dir: Path | None = None) -> tuple[Path, int]:
    """Run a config in the background under a supervisor; returns the run folder and the supervisor's process id.

    The config is checked here first, so its errors appear at once. Raises CvmError.
    """
    run_dir = find_run_dir(config_path, overrides, output_dir)
    return run_dir, launch(supervisor_command(config_path, overrides, run_dir), run_dir)


def resume(run_dir: Path) -> tuple[Path, int]:
    """Carry on a run in the background from its own config.yaml; returns what `start` does."""
    require_run_folder(run_dir)
    return start(RunLayout(run_dir).config, [], run_dir)


def supervise(config_path: Path, overrides: list[str], output_dir: Path | None, *, progress: bool) -> int:
    """Run a config under a supervisor that is this process; returns its exit code. Raises CvmError.

    The first trainer is `run` with what is given here; whoever follows it after a crash is `resume`, by the config that
    the run folder holds.
    """
    run_dir = find_run_dir(config_path, overrides, output_dir)
    quiet = [] if progress else ["--no-progress"]
    first = [*PROGRAM, "run", *_options(config_path, overrides, run_dir), *quiet]
    again = [*PROGRAM, "resume", str(run_dir), "--foreground", *quiet]
    return Supervisor(RunLayout(run_dir), first, again).run()


def supervisor_command(config_path: Path, overrides: Sequence[str], run_dir: Path) -> list[str]:
    """What a supervisor is started with, in the background or as a service: `start --foreground`."""
    return [*PROGRAM, "start", *_options(config_path, overrides, run_dir), "--foreground", "--no-progress"]


def find_run_dir(config_path: Path, overrides: Sequence[str], output_dir: Path | None) -> Path:
    """The run folder of a config. Raises CvmError for one that is wrong."""
    from cvm_translator.config import load_config

    return Path(load_config(config_path, list(overrides), output_dir).output_dir).absolute()


def _options(config_path: Path, overrides: Sequence[str], run_dir: Path) -> list[str]:
    settings = [part for override in overrides for part in ("--set", override)]
    return [str(config_path), *settings, "--output-dir", str(run_dir)]


def require_run_folder(run_dir: Path) -> None:
    """Raise RunFolderError unless a run was started in this folder."""
    if not RunLayout(run_dir).config.is_file():
        raise RunFolderError(f"{run_dir} is no run folder: it has no config.yaml; begin one with cvm-translator start")


def launch(command: list[str], run_dir: Path, timeout_seconds: float = START_TIMEOUT_SECONDS) -> int:
    """Start `command`, a supervisor of `run_dir`, detached; its process id once its trainer's run has begun."""
    layout = RunLayout(run_dir)
    holder = find_keeper(layout)
    if holder is not None:
        raise RunFolderError(
            f"{run_dir} is in use by process {holder.get('pid')} on {holder.get('host')}: it runs already;"
            f" stop it with cvm-translator stop {run_dir}, or choose another --output-dir"
        )
    layout.logs.mkdir(parents=True, exist_ok=True)
    tail = EventTail(layout.events)
    tail.poll()
    # Whoever called this may be a service; its socket is not the new process's to speak to.
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    with open(daemon_log(run_dir), "ab") as log:
        log_start = log.tell()
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
    try:
        _wait_until_running(process, tail, layout, log_start, timeout_seconds)
    finally:
        tail.close()
    return process.pid


def find_keeper(layout: RunLayout) -> dict[str, Any] | None:
    """Who keeps the run going: its supervisor, else the process that holds its lock, else None."""
    return read_holder(layout.supervisor_lock) or read_holder(layout.lock)


def _wait_until_running(
    process: subprocess.Popen[Any], tail: EventTail, layout: RunLayout, log_start: int, timeout_seconds: float
) -> None:
    """Of starts at once each sees the winner's events, so the supervisor's lock must name our own process."""
    deadline = time.monotonic() + timeout_seconds
    begun: set[Any] = set()
    while time.monotonic() < deadline:
        code = process.poll()  # asked before the events are read, so that the last of them is not missed
        begun |= {event.get("pid") for event in tail.poll() if event["kind"] == "run_started"}
        if code is not None:
            if begun and code in (EXIT_OK, EXIT_GATE_FAILED):
                return
            raise _start_error(code, layout.root, log_start)
        is_ours = (read_holder(layout.supervisor_lock) or {}).get("pid") == process.pid
        if is_ours and (read_holder(layout.lock) or {}).get("pid") in begun:
            return
        time.sleep(_POLL_SECONDS)
    process.terminate()
    process.wait()
    raise StartError(
        f"the run did not begin within {timeout_seconds:.0f} s and was ended: see {daemon_log(layout.root)}", EXIT_ERROR
    )


def _start_error(code: int, run_dir: Path, log_start: int) -> StartError:
    """The child's own words, if it said any."""
    with open(daemon_log(run_dir), "rb") as log:
        log.seek(log_start)
        lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if errors:
        return StartError(errors[-1], code)
    if code < 0:
        return StartError(f"the run was ended by signal {-code} before it began: see {daemon_log(run_dir)}", 128 - code)
    last = lines[-1] if lines else "it said nothing"
    return StartError(f"the run ended with exit code {code} before it began ({last}): see {daemon_log(run_dir)}", code)


def stop(run_dir: Path, timeout_seconds: float = STOP_TIMEOUT_SECONDS) -> int:
    """Ask the run to save and leave, and wait until it has; returns the process id that was asked.

    Raises NotRunningError when nobody holds the folder; RunFolderError when its holder cannot be signalled safely or
    has not left in time.
    """
    layout = RunLayout(run_dir)
    lock = layout.supervisor_lock
    holder = read_holder(lock)
    if holder is None:
        lock = layout.lock
        holder = read_holder(lock)
    if holder is None:
        raise NotRunningError(f"no run holds {run_dir}: there is nothing to stop")
    pid = _signal_holder(lock, holder)
    asked = {pid, (read_holder(layout.lock) or holder).get("pid")}
    deadline = time.monotonic() + timeout_seconds
    while any((read_holder(path) or {}).get("pid", 0) in asked for path in (layout.supervisor_lock, layout.lock)):
        if time.monotonic() > deadline:
            raise RunFolderError(
                f"process {pid} was asked to stop but still holds {run_dir} after {timeout_seconds:.0f} s:"
                f" wait for it, or make it leave without saving with kill {pid}"
            )
        time.sleep(_POLL_SECONDS)
    return pid


def _signal_holder(lock: Path, holder: dict[str, Any]) -> int:
    """Send SIGTERM to the process that the lock names, if it is certainly that process."""
    run_dir, pid, host = lock.parent, holder.get("pid"), holder.get("host")
    if host != socket.gethostname() or not isinstance(pid, int):
        raise RunFolderError(f"{run_dir} is held by process {pid} on {host}, not on this host: stop it there")
    is_other = RunFolderError(
        f"{run_dir} is held, but process {pid} is not the one that took the lock: no signal was sent;"
        f" find the holder with lsof {lock}"
    )
    if not hasattr(os, "pidfd_open"):  # no such calls outside Linux: the check and the signal are two steps there
        if holder.get("process_start_time") != process_start_time(pid):
            raise is_other
        os.kill(pid, signal.SIGTERM)
        return pid
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        raise is_other from None
    try:
        if holder.get("process_start_time") != process_start_time(pid):
            raise is_other
        signal.pidfd_send_signal(descriptor, signal.SIGTERM)
    except ProcessLookupError:
        pass  # it left by itself in the meantime
    finally:
        os.close(descriptor)
    return pid
