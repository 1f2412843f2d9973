"""Starting a run in a process of its own, and asking it to stop.

Guarantees: `start` and `resume` return only once the new process holds the run's lock and has written its first event;
if it ends before that, its own one-line error and exit code are passed on. The process leads a session of its own, so
closing the terminal does not end it; what it prints is appended to `logs/daemon.log`.

`stop` signals only the process that holds the lock now, on this host, and whose start time is the recorded one: a
process id that was reused is never signalled. It returns when the lock is free, that is, when everything is saved.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
    """Run a config in the background; returns the run folder and the process id.

    The config is checked here first, so its errors appear at once. Raises CvmError.
    """
    from cvm_translator.config import load_config

    run_dir = Path(load_config(config_path, overrides, output_dir).output_dir).absolute()
    options = [part for override in overrides for part in ("--set", override)]
    command = [*PROGRAM, "run", str(config_path), *options, "--output-dir", str(run_dir), "--no-progress"]
    return run_dir, launch(command, run_dir)


def resume(run_dir: Path) -> tuple[Path, int]:
    """Carry on a run in the background from its own config.yaml; returns the run folder and the process id."""
    require_run_folder(run_dir)
    run_dir = run_dir.absolute()
    return run_dir, launch([*PROGRAM, "resume", str(run_dir), "--foreground", "--no-progress"], run_dir)


def require_run_folder(run_dir: Path) -> None:
    """Raise RunFolderError unless a run was started in this folder."""
    if not RunLayout(run_dir).config.is_file():
        raise RunFolderError(f"{run_dir} is no run folder: it has no config.yaml; begin one with cvm-translator start")


def launch(command: list[str], run_dir: Path, timeout_seconds: float = START_TIMEOUT_SECONDS) -> int:
    """Start `command`, a run in `run_dir`, detached; its process id once it holds the lock and wrote `run_started`."""
    layout = RunLayout(run_dir)
    holder = read_holder(layout.lock)
    if holder is not None:
        raise RunFolderError(
            f"{run_dir} is in use by process {holder.get('pid')} on {holder.get('host')}: it runs already;"
            f" stop it with cvm-translator stop {run_dir}, or choose another --output-dir"
        )
    layout.logs.mkdir(parents=True, exist_ok=True)
    tail = EventTail(layout.events)
    tail.poll()
    with open(daemon_log(run_dir), "ab") as log:
        log_start = log.tell()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        _wait_until_running(process, tail, layout, log_start, timeout_seconds)
    finally:
        tail.close()
    return process.pid


def _wait_until_running(
    process: subprocess.Popen[Any], tail: EventTail, layout: RunLayout, log_start: int, timeout_seconds: float
) -> None:
    deadline = time.monotonic() + timeout_seconds
    has_begun = False
    while time.monotonic() < deadline:
        code = process.poll()  # asked before the events are read, so that the last of them is not missed
        has_begun |= any(event["kind"] == "run_started" and event.get("pid") == process.pid for event in tail.poll())
        if code is not None:
            if has_begun and code in (EXIT_OK, EXIT_GATE_FAILED):
                return
            raise _start_error(code, layout.root, log_start)
        if has_begun and (read_holder(layout.lock) or {}).get("pid") == process.pid:
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
    holder = read_holder(layout.lock)
    if holder is None:
        raise NotRunningError(f"no run holds {run_dir}: there is nothing to stop")
    pid = _signal_holder(run_dir, holder)
    deadline = time.monotonic() + timeout_seconds
    while (now := read_holder(layout.lock)) is not None and now.get("pid") == pid:
        if time.monotonic() > deadline:
            raise RunFolderError(
                f"process {pid} was asked to stop but still holds {run_dir} after {timeout_seconds:.0f} s:"
                f" wait for it, or make it leave without saving with kill {pid}"
            )
        time.sleep(_POLL_SECONDS)
    return pid


def _signal_holder(run_dir: Path, holder: dict[str, Any]) -> int:
    """Send SIGTERM to the process that the lock names, if it is certainly that process."""
    pid, host = holder.get("pid"), holder.get("host")
    if host != socket.gethostname() or not isinstance(pid, int):
        raise RunFolderError(f"{run_dir} is held by process {pid} on {host}, not on this host: stop it there")
    is_other = RunFolderError(
        f"{run_dir} is held, but process {pid} is not the one that took the lock: no signal was sent;"
        f" find the holder with lsof {RunLayout(run_dir).lock}"
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
