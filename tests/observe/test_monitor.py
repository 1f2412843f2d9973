"""The monitor before, during and after a run: it reads, tells, reports and leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cvm_translator.cli import main as command_line
from cvm_translator.observe.live import build_view, sparkline
from cvm_translator.observe.machine import MachineFigures, ProcessWatch
from cvm_translator.observe.monitor import main
from cvm_translator.observe.watch import RunWatch
from cvm_translator.runs.events import EventWriter
from cvm_translator.runs.lock import RunLock, process_start_time

COMMAND = [sys.executable, "-m", "cvm_translator", "monitor"]
SCRIPT = Path(__file__).parents[2] / "monitor_distillation.py"


def _wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------------------- once


@pytest.mark.parametrize(("until", "code"), [("run_finished", 0), ("stopped", 3), ("failed", 4)])
def test_once(make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str], until: str, code: int) -> None:
    root = make_run(until=until)
    assert main(root, once=True) == code
    assert "1,000 of 1,000" in capsys.readouterr().out
    assert main(root, once=True, as_json=True) == code
    assert json.loads(capsys.readouterr().out)["step"] == 1000
    assert not (root / "monitor").exists()


IMPORTED = """
import sys
from cvm_translator.cli import main
code = main(sys.argv[1:])
assert not {"torch", "pydantic"} & set(sys.modules)
sys.exit(code)
"""


@pytest.mark.parametrize("arguments", [["monitor", "--once"], ["status"]])
def test_once_as_a_process_never_imports_torch(make_run: Callable[..., Path], arguments: list[str]) -> None:
    command = [sys.executable, "-c", IMPORTED, *arguments, str(make_run())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "the gate passed" in result.stdout


def test_the_script_looks_at_distillation_output_and_takes_all_options(make_run: Callable[..., Path]) -> None:
    root = make_run()
    root.rename(root.with_name("distillation_output"))
    command = [sys.executable, str(SCRIPT)]
    once = subprocess.run([*command, "--once", "--json"], cwd=root.parent, capture_output=True, text=True)
    assert (once.returncode, once.stderr) == (0, "")
    assert json.loads(once.stdout)["state"] == "done"
    options = ["distillation_output", "--report-every", "1000", "--refresh", "0.05", "--json"]
    followed = subprocess.run([*command, *options], cwd=root.parent, capture_output=True, text=True)
    assert (followed.returncode, followed.stderr) == (0, "")
    assert json.loads(followed.stdout)["state"] == "done"
    assert (root.with_name("distillation_output") / "monitor" / "status_report.md").is_file()


@pytest.mark.parametrize("arguments", [["--refresh", "0"], ["--report-every", "-1"], ["--nope"], ["a", "b"]])
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command_line(["monitor", *arguments])
    assert error.value.code == 2
    assert "usage:" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- following


def test_after_the_run(no_plots: None, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    root = make_run()
    assert main(root, refresh_seconds=0.05) == 0
    shown = capsys.readouterr().out
    assert shown.count("ALERT") == 3 and "the gate passed" in shown
    assert (root / "monitor" / "status_report.md").exists()
    assert len((root / "monitor" / "alerts.log").read_text().splitlines()) == 3
    assert main(root, refresh_seconds=0.05) == 0
    assert "ALERT" not in capsys.readouterr().out


def test_a_failed_run_ends_it_with_its_code(
    no_plots: None, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(make_run(until="failed"), refresh_seconds=0.05) == 4
    assert "no such file" in capsys.readouterr().out


def test_before_and_during_the_run(tmp_path: Path) -> None:
    """A process that waits for the folder, follows two stages and leaves; the folder's other files stay untouched."""
    root = tmp_path / "later"
    process = subprocess.Popen(
        [*COMMAND, str(root), "--refresh", "0.1"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == f"waiting for a run in {root}\n"
        assert not root.exists()
        with RunLock(root / "run.lock"):
            events = EventWriter(root / "logs" / "events.jsonl")
            events.write("run_started", pid=process.pid, num_iterations=20, stages=["distil"])
            events.write("stage_started", stage="distil")
            for step in range(1, 11):
                events.buffer("train", step=step, stage="distil", loss=1.0, executed_step=step)
            events.write(
                "validation",
                step=10,
                stage="distil",
                scores={"bleu": 30.0},
                teacher_scores={"bleu": 33.0},
                quality_score=0.9,
            )
            lines = iter(process.stdout.readline, "")
            _read_until(lines, "validation at step 10: quality 90.0 % of the teacher, BLEU 30.00 (teacher 33.00)")
            events.write("verdict", step=10, verdict="degraded", drop=0.1, action="roll_back", best_step=5)
            _read_until(lines, "ALERT WARNING: verdict at step 10: degraded")
            events.write("run_finished", exit_code=5, gate_passed=False, halted=False, seconds=7.0, executed_steps=20)
            events.close()
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "ALERT CRITICAL: run finished" in rest and "the gate FAILED" in rest
    found = {path.relative_to(root).parts[0] for path in root.rglob("*")}
    assert found == {"run.lock", "logs", "monitor"}


def _read_until(lines: Iterator[str], text: str) -> None:
    seen = []
    for line in lines:
        seen.append(line)
        if text in line:
            return
    raise AssertionError(f"{text!r} not in {seen}")


def test_ctrl_c_leaves_cleanly(make_run: Callable[..., Path]) -> None:
    root = make_run(until="distil")
    process = subprocess.Popen(
        [*COMMAND, str(root), "--refresh", "0.1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    _wait_for(lambda: (root / "monitor" / "status_report.html").exists())
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "ALERT CRITICAL" in out and "is gone without a word" in out
    assert "goes on without it" in err and "Traceback" not in err
    assert not list((root / "monitor").rglob(".tmp-*"))


def test_json_lines(no_plots: None, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(make_run(), as_json=True, refresh_seconds=0.05) == 0
    (line,) = capsys.readouterr().out.splitlines()
    data = json.loads(line)
    assert data["state"] == "done" and [alert["level"] for alert in data["alerts"]] == ["WARNING", "WARNING", "INFO"]


# ----------------------------------------------------------------------------------------------- watching the files


def _write_steps(path: Path, steps: range, end: str = "\n") -> None:
    with open(path, "a") as stream:
        for step in steps:
            last = end if step == steps[-1] else "\n"
            stream.write(json.dumps({"kind": "train", "stage": "distil", "step": step, "time": "t"}) + last)


def test_half_lines_truncation_and_rotation(watch_run: Callable[..., RunWatch], tmp_path: Path) -> None:
    path = tmp_path / "logs" / "events.jsonl"
    watch = watch_run(tmp_path)
    assert watch.poll() == [] and watch.status()["state"] == "never_started"
    path.parent.mkdir()
    _write_steps(path, range(1, 4), end="")
    assert [event["step"] for event in watch.poll()] == [1, 2]
    with open(path, "a") as stream:
        stream.write("\n")
    assert [event["step"] for event in watch.poll()] == [3]
    _write_steps(path, range(4, 6))
    path.rename(tmp_path / "logs" / "events.jsonl.1")
    _write_steps(path, range(6, 8))
    assert [event["step"] for event in watch.poll()] == [4, 5, 6, 7]
    path.write_text("")
    assert watch.poll() == []
    _write_steps(path, range(8, 9))
    assert [event["step"] for event in watch.poll()] == [8]
    assert watch.history.curves["distil"].steps.tolist() == list(range(1, 9))
    assert watch.status()["step"] == 8


def test_log_lines_are_followed(watch_run: Callable[..., RunWatch], tmp_path: Path) -> None:
    watch = watch_run(tmp_path, num_log_lines=2)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "train.log").write_bytes(b"one\ntwo\nthr\xffee\nfou")
    watch.poll()
    assert list(watch.log_lines) == ["two", "thr\ufffdee"]


def test_a_process_is_dead_only_at_the_second_look(
    watch_run: Callable[..., RunWatch], make_run: Callable[..., Path]
) -> None:
    watch = watch_run(make_run(until="distil"))
    watch.poll()
    assert watch.status()["state"] == "dead" and not watch.is_surely_dead()
    watch.poll()
    assert watch.is_surely_dead()


def test_wall_clock_jumps_raise_no_stall(
    watch_run: Callable[..., RunWatch], make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_run(until="distil")
    watch = watch_run(root)
    watch.poll()
    with EventWriter(root / "logs" / "events.jsonl") as events, RunLock(root / "run.lock"):
        events.write("train", step=1001, stage="distil", loss=1.0)
        watch.poll()
        real = time.time
        for jump in (86400.0, -86400.0):
            monkeypatch.setattr(time, "time", lambda jump=jump: real() + jump)
            assert watch.status()["health"] == []


def test_figures_of_the_process() -> None:
    watch = ProcessWatch()
    holder: dict[str, Any] = {"pid": os.getpid(), "process_start_time": process_start_time(os.getpid())}
    figures = watch.measure(holder)
    assert figures is not None and figures["memory_mib"] > 1
    assert watch.measure(holder | {"process_start_time": 1.0}) is None
    assert watch.measure(holder | {"host": "elsewhere"}) is None
    assert watch.measure({"pid": None}) is None and watch.measure(None) is None


# --------------------------------------------------------------------------------------------------------- the view


def test_sparkline() -> None:
    assert sparkline([0.0, 1.0, float("nan"), 2.0], 8) == "▁▅█"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([]) == ""
    assert len(sparkline(list(range(1000)), 48)) == 48


@pytest.mark.parametrize("height", [24, 35, 60])
@pytest.mark.parametrize("until", ["distil", "run_finished", "failed"])
def test_the_live_view(
    watch_run: Callable[..., RunWatch], make_run: Callable[..., Path], until: str, height: int
) -> None:
    import io

    from rich.console import Console

    root = make_run(until=until)
    watch = watch_run(root)
    watch.poll()
    console = Console(file=io.StringIO(), width=110, height=height, color_system=None)
    lines = ["\x1b[31mred [bold]markup[/bold]"]
    console.print(build_view(watch.status(), watch.history, MachineFigures(), [], lines, height))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for part in ("✓ teacher", "1,000 of 1,000", "BLEU", "34.60", "700 -> 600"):
        assert part in shown
    assert "\x1b" not in shown
    assert ("[bold]markup[/bold]" in shown) == (height >= 30)


def test_the_view_of_a_run_that_has_hardly_begun(watch_run: Callable[..., RunWatch], tmp_path: Path) -> None:
    from rich.console import Console

    with EventWriter(tmp_path / "logs" / "events.jsonl") as events:
        events.write("run_started", pid=1)
    watch = watch_run(tmp_path)
    watch.poll()
    with Console(width=100).capture() as capture:
        Console(width=100).print(build_view(watch.status(), watch.history, MachineFigures(), [], [], 24))
    assert capture.get() is not None


# ---------------------------------------------------------------------------------------- the monitor as a whole, again


def test_a_run_that_restarts_under_a_rotated_diary(watch_run: Callable[..., RunWatch], tmp_path: Path) -> None:
    """Its process dies, the diary is rotated twice, and another process goes on: nothing is lost, and it is told."""
    path = tmp_path / "logs" / "events.jsonl"
    watch = watch_run(tmp_path)
    first = EventWriter(path)
    first.write("run_started", pid=1, num_iterations=9)
    _write_steps(path, range(1, 4))
    assert len(watch.poll()) == 4
    _write_steps(path, range(4, 6))
    path.rename(path.with_name("events.jsonl.2"))
    _write_steps(path, range(6, 8))
    path.rename(path.with_name("events.jsonl.1"))
    first.close()
    with EventWriter(path) as second:
        second.write("run_started", pid=2, num_iterations=9)
    _write_steps(path, range(8, 10))
    watch.poll()
    assert watch.history.curves["distil"].steps.tolist() == list(range(1, 10))
    assert [event["pid"] for event in watch.history.restarts] == [2]
    late = watch_run(tmp_path)
    late.poll()
    assert late.history.curves["distil"].steps.tolist() == list(range(1, 10))


def test_without_file_events_it_polls(
    make_run: Callable[..., Path], no_plots: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No watches left on the machine, or an overflow of their queue: they only wake it sooner."""
    from watchdog.observers import Observer

    def refuse(self: Any) -> None:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr(Observer, "start", refuse)
    assert main(make_run(), refresh_seconds=0.05) == 0
    assert "the gate passed" in capsys.readouterr().out


def test_metrics_and_a_command_beside_the_view(make_run: Callable[..., Path], tmp_path: Path) -> None:
    """The real command: a port that answers while the run is watched, an alert that reaches a program."""
    import re
    import urllib.request

    root, told = make_run(until="distil"), tmp_path / "told.jsonl"
    command = [*COMMAND, str(root), "--metrics-port", "0", "--alert-command", f"tee -a {told}", "--refresh", "0.1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        address = re.fullmatch(r"metrics at (http://127\.0\.0\.1:\d+/metrics)\n", process.stderr.readline())
        assert address is not None
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        _wait_for(lambda: b'cvm_state{state="dead"} 1.0' in opener.open(address[1], timeout=30).read(), 90)
        _wait_for(lambda: told.exists() and len(told.read_text().splitlines()) == 3, 90)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0
    names = [json.loads(line)["alert"] for line in told.read_text().splitlines()]
    assert names == ["degradation", "rollback", "dead_process"]
