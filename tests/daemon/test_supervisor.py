"""Crashes, hangs, signals and want of memory: what is started again, what is not, and what the events tell of it."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from cvm_translator.daemon.memory import count_oom_kills, has_grown
from cvm_translator.daemon.supervisor import ROOM_BYTES
from cvm_translator.errors import RunFolderError
from cvm_translator.runs.control import ControlFile
from cvm_translator.runs.lock import RunLock, read_holder
from cvm_translator.runs.micro_batches import read_factors

pytestmark = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # as it should be

CONFIG = """
corpus: {train: [{format: tsv, path: train.tsv}]}
distillation: {batch_size: 12, grad_accum_steps: 2}
"""


def trains(step: int, start: int = 1) -> Any:
    """Whether the `start`-th trainer has come to a step."""
    seen: list[int] = []

    def is_reached(event: dict[str, Any]) -> bool:
        seen.extend([1] if event["kind"] == "run_started" else [])
        return len(seen) >= start and event["kind"] == "train" and event["step"] >= step

    return is_reached


# ------------------------------------------------------------------------------------------------------------ crashes


def test_a_crash_is_followed_by_a_restart(supervised: Any) -> None:
    assert supervised.supervise("kill9,exit70,exit0") == 0
    first, second = supervised.restarts()
    assert (first["signal"], first["exit_code"], first["restart_number"]) == (9, None, 1)
    assert (second["signal"], second["exit_code"], second["restart_number"]) == (None, 70, 2)
    assert (first["stage"], first["step"]) == ("distil", 3)
    assert "killed by signal 9 at distil step 3; it is started again in 0 s" in first["message"]
    assert [event["restarts"] for event in supervised.events("run_started")] == [0, 1, 2]


@pytest.mark.parametrize("code", [0, 1, 2, 5, 130, 143])
def test_what_a_restart_cannot_mend_is_not_started_again(code: int, supervised: Any) -> None:
    assert supervised.supervise(f"exit{code}") == code
    assert len(supervised.events("run_started")) == 1
    assert supervised.restarts() == []


def test_after_five_restarts_within_an_hour_the_run_has_failed(supervised: Any, capfd: Any) -> None:
    assert supervised.supervise("exit70") == 1
    assert len(supervised.events("run_started")) == 6
    delays = [event["delay_seconds"] for event in supervised.restarts()]
    assert delays == pytest.approx([0.01 * 2**n for n in range(5)])
    (failed,) = supervised.events("failed")
    reason = "given up after 5 restarts within an hour; at last the trainer crashed at distil step 3 (exit code 70)"
    assert failed["message"] == reason
    assert f"error: {reason}" in capfd.readouterr().err


def test_a_trainer_that_ends_before_its_run_begins_is_not_started_again(supervised: Any, capfd: Any) -> None:
    assert supervised.supervise("early") == 1
    assert capfd.readouterr().err == "error: corpus.train[0].path: no such file\n"
    assert not supervised.layout.events.exists()


def test_a_trainer_that_cannot_be_started_again_has_failed(supervised: Any) -> None:
    assert supervised.supervise("kill9,early") == 1
    assert "could not be started again" in supervised.events("failed")[0]["message"]


def test_a_trainer_without_room_is_started_again_until_there_is(supervised: Any) -> None:
    """Killed while the disk is full, it cannot even begin: that counts as no restart, however often it is tried."""
    assert supervised.supervise("kill9,full,full,full,full,full,full,exit72,exit0") == 0
    (restart,) = supervised.restarts()
    assert "killed by signal 9" in restart["reason"]
    first, second = (event for event in supervised.events("warning") if event["code"] == "disk_full")
    assert first["message"] == (
        "the trainer found no room on the disk before its run began; it is started again when there is room"
    )
    assert "no room on the disk at distil step 3" in second["message"]
    assert [event["restarts"] for event in supervised.events("run_started")] == [0, 7, 8]
    assert supervised.events("failed") == []


def test_more_room_is_seen_at_once(supervised: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free = iter([0, 0, 100, ROOM_BYTES])
    monkeypatch.setattr("cvm_translator.daemon.supervisor._free_bytes", lambda path: next(free))
    assert supervised.supervise("exit72,exit0", dataclasses.replace(supervised.rules, room_seconds=1000.0)) == 0
    assert list(free) == []


def test_one_that_waits_for_room_can_be_stopped(supervised: Any) -> None:
    def stop() -> None:
        supervised.wait_for(lambda event: event.get("code") == "disk_full")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = supervised.meanwhile(stop)
    assert supervised.supervise("exit72", dataclasses.replace(supervised.rules, room_seconds=1000.0)) == 143
    thread.join()
    assert [event["signal"] for event in supervised.events("stopped")] == [15]


def test_without_room_before_the_first_step_the_run_has_failed(supervised: Any) -> None:
    assert supervised.supervise("full") == 1
    assert not supervised.layout.events.exists()
    assert supervised.supervise("stepless72") == 1
    (failed,) = supervised.events("failed")
    assert failed["message"].startswith("no room on the disk before the first step")
    assert len(supervised.events("run_started")) == 1


def test_a_folder_that_somebody_else_took_over_is_left_alone(supervised: Any) -> None:
    """Between death and restart another process takes the run: its lock and its events stay its own."""

    def take() -> None:
        supervised.wait_for(trains(4))
        while True:
            try:
                lock.acquire()
                return
            except RunFolderError:
                time.sleep(0.001)

    lock = RunLock(supervised.layout.lock)
    thread = supervised.meanwhile(take)
    try:
        assert supervised.supervise("exit70") == 1
    finally:
        thread.join()
        lock.release()
    assert supervised.events("failed") == []


def test_a_run_that_was_paused_is_paused_again(supervised: Any) -> None:
    assert supervised.supervise("paused,exit0") == 0
    assert [request.action for request in ControlFile(supervised.layout.control).poll()] == ["pause"]
    assert "paused at distil step 3" in supervised.restarts()[0]["reason"]


# -------------------------------------------------------------------------------------------------------------- hangs


@pytest.mark.parametrize("act", ["hang", "deaf"])
def test_a_hang_is_seen_and_ended(act: str, supervised: Any) -> None:
    """One that hears SIGTERM is left to it; one that does not is killed."""
    rules = dataclasses.replace(supervised.impatient, grace_seconds=0.5 if act == "deaf" else 60.0)
    assert supervised.supervise(f"{act},exit0", rules) == 0
    (restart,) = supervised.restarts()
    assert "no sign of progress for" in restart["reason"]
    assert "at distil step 3: the trainer hung" in restart["reason"]
    assert (restart["signal"], restart["exit_code"]) == ((9, None) if act == "deaf" else (None, 143))


# ------------------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_nothing_is_started_again(number: signal.Signals, supervised: Any) -> None:
    process = supervised.start("on")
    supervised.wait_for(trains(5))
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    (stopped,) = supervised.events("stopped")
    assert (stopped["signal"], stopped["gone"]) == (number, False)
    assert read_holder(supervised.layout.lock) is None
    assert len(supervised.events("run_started")) == 1


def test_a_second_signal_leaves_at_once(supervised: Any) -> None:
    process = supervised.start("slow")
    supervised.wait_for(trains(5))
    process.send_signal(signal.SIGTERM)
    supervised.wait_for(lambda event: event.get("saving"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert supervised.events("stopped") == []


def test_a_stop_between_two_starts_is_obeyed(supervised: Any) -> None:
    def stop() -> None:
        supervised.wait_for(lambda event: event.get("code") == "restart")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = supervised.meanwhile(stop)
    assert supervised.supervise("exit70", dataclasses.replace(supervised.rules, first_delay_seconds=100.0)) == 143
    thread.join()
    assert supervised.events("stopped")[0]["signal"] == 15
    assert len(supervised.events("run_started")) == 1


def test_when_the_supervisor_dies_the_trainer_leaves(supervised: Any) -> None:
    process = supervised.start("on")
    supervised.wait_for(trains(5))
    process.kill()
    process.wait()
    stopped = supervised.wait_for(lambda event: event["kind"] == "stopped")
    assert stopped["gone"]
    assert read_holder(supervised.layout.supervisor_lock) is None


def test_a_terminal_does_not_signal_the_trainer_twice(supervised: Any) -> None:
    supervised.start("on")
    supervised.wait_for(trains(2))
    pid = supervised.events("run_started")[0]["pid"]
    assert os.getsid(pid) == pid


def test_one_supervisor_a_folder(supervised: Any) -> None:
    process = supervised.start("on")
    supervised.wait_for(trains(2))
    with pytest.raises(RunFolderError, match=f"in use by process {process.pid} "):
        supervised.supervise("on")
    assert len(supervised.events("run_started")) == 1


# ------------------------------------------------------------------------------------------------------- out of memory


@pytest.fixture
def configured(supervised: Any) -> Any:
    supervised.run_dir.mkdir()
    supervised.layout.config.write_text(CONFIG)
    return supervised


def test_want_of_memory_doubles_the_micro_batches(configured: Any) -> None:
    assert configured.supervise("exit71,exit71,exit0") == 0
    first, second = (event["message"] for event in configured.restarts())
    assert "out of memory at distil step 3" in first
    assert "4 micro-batches a step instead of 2 and the same effective batch of 12 sentences; not bit for bit" in first
    assert "8 micro-batches a step instead of 4" in second
    assert read_factors(configured.layout.micro_batches) == {"distil": 4}


def test_a_kill_for_memory_is_told_from_other_kills(configured: Any) -> None:
    kills = iter([{"group": 3}, {"group": 3}, {"group": 3}, {"group": 4}, {"group": 4}, {"group": 4}])
    assert configured.supervise("kill9,kill9,exit0", count_kills=lambda: next(kills)) == 0
    first, second = (event["message"] for event in configured.restarts())
    assert "killed by signal 9" in first
    assert "out of memory" in second
    assert read_factors(configured.layout.micro_batches) == {"distil": 2}


def test_micro_batches_of_one_sentence_are_cut_no_further(configured: Any) -> None:
    assert configured.supervise("exit71,exit71,exit71,exit71,exit0") == 0
    messages = [event["message"] for event in configured.restarts()]
    assert "12 micro-batches a step instead of 8" in messages[2]
    assert "micro-batches" not in messages[3]
    assert read_factors(configured.layout.micro_batches) == {"distil": 8}


def test_the_kernels_counters(tmp_path: Path) -> None:
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    for folder in (proc / "self", groups / "app", groups / "memory" / "old"):
        folder.mkdir(parents=True)
    (proc / "vmstat").write_text("nr_free 12\noom_kill 7\n")
    (proc / "self" / "cgroup").write_text("3:cpu,memory:/old\n0::/app\n")
    (groups / "app" / "memory.events").write_text("oom 2\noom_kill 1\noom_group_kill 0\n")
    (groups / "memory" / "old" / "memory.oom_control").write_text("under_oom 0\noom_kill 5\n")
    before = count_oom_kills(groups, proc)
    assert sorted(before.values()) == [1, 5, 7]
    (groups / "app" / "memory.events").write_text("oom 3\noom_kill 2\noom_group_kill 0\n")
    assert has_grown(before, count_oom_kills(groups, proc))
    assert not has_grown(before, before)
    assert count_oom_kills(tmp_path / "none", tmp_path / "none") == {}
