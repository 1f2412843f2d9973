"""Graphics cards are shown where there are any, and are never an error."""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cvm_translator.observe import machine
from cvm_translator.observe.live import build_view
from cvm_translator.observe.machine import GpuWatch, MachineFigures, MachineWatch, parse_gpus
from cvm_translator.observe.watch import RunWatch
from cvm_translator.runs.layout import RunLayout

ANSWER = "0, NVIDIA H100 80GB HBM3, 87, 20480, 81559, 61\n1, Odd, name, [N/A], 12, 24576, [Not Supported]\n"


def test_the_answer_of_nvidia_smi() -> None:
    first, second = parse_gpus(ANSWER)
    assert (first.index, first.name) == ("0", "NVIDIA H100 80GB HBM3")
    assert (first.utilization_percent, first.memory_used_mib, first.temperature_celsius) == (87.0, 20480.0, 61.0)
    assert second.name == "Odd, name" and math.isnan(second.utilization_percent) and second.memory_total_mib == 24576.0
    assert parse_gpus("No devices were found\n") == parse_gpus("") == ()


def _program(path: Path, body: str) -> None:
    path.write_text(f"#!{sys.executable}\nimport sys, time\n{body}\n")
    path.chmod(0o755)


def _measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> GpuWatch:
    _program(tmp_path / "nvidia-smi", body)
    monkeypatch.setenv("PATH", str(tmp_path))
    watch = GpuWatch()
    assert watch.measure() == ()
    assert watch._thread is not None
    watch._thread.join(60)
    return watch


def test_cards_are_asked_in_the_background(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = _measured(tmp_path, monkeypatch, f"assert '--query-gpu' in sys.argv[1]; print({ANSWER!r}, end='')")
    assert [gpu.index for gpu in watch.measure()] == ["0", "1"]


@pytest.mark.parametrize("body", ["sys.exit(9)", "sys.stdout.buffer.write(b'\\xff, 1')", "time.sleep(600)"])
def test_a_program_that_fails_or_hangs_is_no_card(body: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "GPU_SECONDS", 1.0 if "sleep" in body else 60.0)
    start = time.monotonic()
    assert _measured(tmp_path, monkeypatch, body).measure() == ()
    assert time.monotonic() - start < 60


def test_a_machine_without_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    watch = MachineWatch(tmp_path / "gone")
    watch.look(None)
    assert watch.figures == MachineFigures(None, None, ())


def test_the_view_shows_them(make_run: Callable[..., Path]) -> None:
    from rich.console import Console

    watch = RunWatch(RunLayout(make_run(until="distil")))
    watch.poll()
    figures = MachineFigures(
        {"cpu_percent": 98.0, "memory_mib": 900.0, "num_threads": 2.0}, 3 << 30, parse_gpus(ANSWER)
    )
    console = Console(file=io.StringIO(), width=200, height=60, color_system=None)
    console.print(build_view(watch.status(), watch.history, figures, [], [], 60))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "CPU 98 %, memory 900 MiB" in shown and "disk 3.0 GiB free" in shown
    assert "GPU 0 87 % (20,480 of 81,559 MiB, NVIDIA H100 80GB HBM3)" in shown and "GPU 1 – % (12 of" in shown
    assert "1 degraded" in shown
    watch.close()
