"""Starting and stopping: one winner, no signal to a stranger, the child's own error passed on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cvm_translator.daemon import NotRunningError, StartError, background, resume, start, stop
from cvm_translator.errors import ConfigError, RunFolderError
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.lock import RunLock, read_holder

pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # as it should be

# A run in small: the real lock, the real events, the real signal; it only has no model. It leaves on SIGTERM after
# argv[2] seconds of saving.
CHILD = """
import os, signal, sys, threading, time
from pathlib import Path
from cvm_translator.errors import CvmError
from cvm_translator.runs.events import EventWriter
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.lock import RunLock
layout, seconds = RunLayout(Path(sys.argv[1])), float(sys.argv[2])
asked = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: asked.set())
try:
    with RunLock(layout.lock), EventWriter(layout.events) as events:
        events.write("run_started", pid=os.getpid())
        print("running")
        while not asked.wait(0.02):
            pass
        time.sleep(seconds)
        events.write("stopped", signal=15)
except CvmError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
sys.exit(143)
"""

# What `start` begins: a supervisor, here of the child above.
SUPERVISOR = """
import sys
from pathlib import Path
from cvm_translator.daemon.supervisor import Supervisor
from cvm_translator.errors import CvmError
from cvm_translator.runs.layout import RunLayout
try:
    sys.exit(Supervisor(RunLayout(Path(sys.argv[1])), sys.argv[2:], sys.argv[2:]).run())
except CvmError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(1)
"""


@pytest.fixture
def started() -> Iterator[list[int]]:
    """Process ids that the test started, ended after it whatever happened."""
    pids: list[int] = []
    yield pids
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def unsupervised(run_dir: Path, seconds: float = 0.0) -> list[str]:
    return [sys.executable, "-c", CHILD, str(run_dir), str(seconds)]


def child(run_dir: Path, seconds: float = 0.0) -> list[str]:
    return [sys.executable, "-c", SUPERVISOR, str(run_dir), *unsupervised(run_dir, seconds)]


def test_launch_returns_when_the_run_holds_its_folder(tmp_path: Path, started: list[int]) -> None:
    pid = background.launch(child(tmp_path), tmp_path)
    started.append(pid)
    holder = read_holder(RunLayout(tmp_path).lock)
    supervisor = read_holder(RunLayout(tmp_path).supervisor_lock)
    assert holder is not None
    assert supervisor is not None
    assert holder["pid"] != pid  # the trainer's
    assert supervisor["pid"] == pid
    assert os.getsid(pid) == pid
    assert stop(tmp_path) == pid
    assert read_holder(RunLayout(tmp_path).lock) is None
    assert read_holder(RunLayout(tmp_path).supervisor_lock) is None
    assert RunLayout(tmp_path).events.read_text().count('"stopped"') == 1


def test_a_run_that_nobody_supervises_is_stopped_itself(tmp_path: Path) -> None:
    process = subprocess.Popen(unsupervised(tmp_path))
    while read_holder(RunLayout(tmp_path).lock) is None or not RunLayout(tmp_path).events.exists():
        assert process.poll() is None
        time.sleep(0.02)
    assert stop(tmp_path) == process.pid
    assert process.wait() == 143


def test_stop_waits_for_the_save(tmp_path: Path, started: list[int]) -> None:
    started.append(background.launch(child(tmp_path, 0.5), tmp_path))
    with pytest.raises(RunFolderError, match=r"still holds .* after 0 s"):
        stop(tmp_path, timeout_seconds=0.1)
    deadline = time.monotonic() + 30
    while read_holder(RunLayout(tmp_path).lock) is not None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert '"stopped"' in RunLayout(tmp_path).events.read_text()


def test_a_second_start_is_told_who_holds_the_folder(tmp_path: Path, started: list[int]) -> None:
    pid = background.launch(child(tmp_path), tmp_path)
    started.append(pid)
    with pytest.raises(RunFolderError, match=f"in use by process {pid} .*cvm-translator stop"):
        background.launch(child(tmp_path), tmp_path)
    stop(tmp_path)


def test_of_starts_at_once_one_wins(tmp_path: Path, started: list[int]) -> None:
    results: list[int | Exception] = []

    def launch() -> None:
        try:
            results.append(background.launch(child(tmp_path), tmp_path))
        except (StartError, RunFolderError) as error:
            results.append(error)

    threads = [threading.Thread(target=launch) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winners = [result for result in results if isinstance(result, int)]
    started += winners
    assert len(winners) == 1
    assert all("in use by process" in str(result) for result in results if isinstance(result, Exception))
    stop(tmp_path)


def test_the_childs_own_error_and_exit_code_are_passed_on(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "daemon.log").write_text("error: of an earlier run\n")
    code = "import sys; print('error: corpus.train[0].path: no such file', file=sys.stderr); sys.exit(1)"
    with pytest.raises(StartError, match=r"corpus\.train\[0\]") as caught:
        background.launch([sys.executable, "-c", code], tmp_path)
    assert caught.value.exit_code == 1
    assert (tmp_path / "logs" / "daemon.log").read_text().count("error: ") == 2


@pytest.mark.parametrize(
    ("code", "message", "exit_code"),
    [
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9", 137),
        ("print('half a word'); raise SystemExit(7)", "exit code 7 before it began .half a word", 7),
    ],
)
def test_a_child_that_dies_without_a_word(tmp_path: Path, code: str, message: str, exit_code: int) -> None:
    with pytest.raises(StartError, match=message) as caught:
        background.launch([sys.executable, "-c", code], tmp_path)
    assert caught.value.exit_code == exit_code


def test_a_child_that_never_begins_is_ended(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="did not begin within"):
        background.launch([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path, timeout_seconds=0.5)


def test_nothing_to_stop(tmp_path: Path) -> None:
    with pytest.raises(NotRunningError, match="nothing to stop") as caught:
        stop(tmp_path)
    assert caught.value.exit_code == 3


def test_a_lock_file_left_by_a_killed_run_blocks_nothing(tmp_path: Path, started: list[int]) -> None:
    first = background.launch(child(tmp_path), tmp_path)
    trainer = read_holder(RunLayout(tmp_path).lock)
    assert trainer is not None
    os.kill(first, signal.SIGKILL)
    os.waitpid(first, 0)
    os.kill(trainer["pid"], signal.SIGKILL)
    while read_holder(RunLayout(tmp_path).lock) is not None:
        time.sleep(0.01)
    with pytest.raises(NotRunningError):
        stop(tmp_path)
    second = background.launch(child(tmp_path), tmp_path)
    started.append(second)
    assert stop(tmp_path) == second


def test_no_signal_to_a_process_whose_start_time_differs(tmp_path: Path) -> None:
    """This process holds the lock, but the lock names a stranger's process id: the stranger must live."""
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    lock = RunLock(RunLayout(tmp_path).lock)
    try:
        lock.acquire()
        holder = json.loads(RunLayout(tmp_path).lock.read_text())
        RunLayout(tmp_path).lock.write_text(json.dumps(holder | {"pid": stranger.pid}))
        with pytest.raises(RunFolderError, match="no signal was sent"):
            stop(tmp_path)
        RunLayout(tmp_path).lock.write_text(json.dumps(holder | {"host": "elsewhere"}))
        with pytest.raises(RunFolderError, match="on elsewhere, not on this host"):
            stop(tmp_path)
        assert stranger.poll() is None
    finally:
        lock.release()
        stranger.kill()
        stranger.wait()


def test_resume_needs_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"no run folder: it has no config\.yaml"):
        resume(tmp_path)


def test_start_checks_the_config_before_anything_is_made(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("distilation: {}\n")
    with pytest.raises(ConfigError, match="distillation"):
        start(config, [], tmp_path / "run")
    assert not (tmp_path / "run").exists()
