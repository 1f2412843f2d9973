"""What Prometheus gets: parsed by its own parser, from a real port."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cvm_translator.cli import main as command_line
from cvm_translator.observe.alerts import Alert
from cvm_translator.observe.history import read_history
from cvm_translator.observe.machine import Gpu, MachineFigures
from cvm_translator.observe.metrics import MetricsPort
from cvm_translator.observe.status import read_status
from cvm_translator.runs.events import EventWriter

GPU = Gpu("0", "NVIDIA H100", 87.0, 2048.0, 81920.0, 61.0)
MACHINE = MachineFigures({"cpu_percent": 150.0, "memory_mib": 2.0, "num_threads": 3.0}, 7_000_000, (GPU,))
ALERTS = [Alert(f"rollback/{number}", "WARNING", "m", "t") for number in range(2)] + [
    Alert("failed/1", "CRITICAL", "m", "t")
]


@pytest.fixture
def port() -> Iterator[MetricsPort]:
    opened = MetricsPort("127.0.0.1", 0)
    yield opened
    opened.close()


def ask(port: MetricsPort) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    text = opener.open(port.address, timeout=30).read().decode()
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation for family in families)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def show(port: MetricsPort, root: Path, machine: MachineFigures = MACHINE, alerts: list[Alert] = ALERTS) -> None:
    port.show(read_status(root), read_history(root / "logs" / "events.jsonl"), machine, alerts)


def test_all_that_a_run_tells(port: MetricsPort, make_run: Callable[..., Path]) -> None:
    root = make_run(until="distil")
    assert ask(port) == {}
    show(port, root)
    found = ask(port)
    status = read_status(root)
    stage = (("stage", "distil"),)
    assert found["cvm_up", ()] == 0.0
    assert found["cvm_state", (("state", "dead"),)] == 1.0 and found["cvm_state", (("state", "done"),)] == 0.0
    assert found["cvm_step", stage] == found["cvm_iterations", stage] == 1000
    assert found["cvm_executed_steps_total", ()] == 1100
    for part, name in (("total", "loss"), ("distillation", "distillation_loss"), ("task", "task_loss")):
        expected = pytest.approx(status["losses"][f"recent_{name}"])
        assert found["cvm_loss", (("part", part), *stage)] == expected
    assert found["cvm_quality_score", ()] == pytest.approx(status["validation"]["quality_score"])
    assert found["cvm_best_quality_score", ()] >= found["cvm_quality_score", ()]
    assert found["cvm_score", (("metric", "bleu"), ("model", "teacher"))] == pytest.approx(34.6)
    assert found["cvm_verdicts_total", (("verdict", "degraded"),)] == 1
    assert sum(value for (name, _), value in found.items() if name == "cvm_verdicts_total") == 11
    assert found["cvm_rollbacks_total", ()] == 1
    assert found["cvm_checkpoint_age_seconds", ()] > 0
    assert found["cvm_steps_per_second", stage] == 2.5
    assert found["cvm_utilisation_ratio", stage] == 0.4
    assert found["cvm_alerts_total", (("alert", "rollback"), ("level", "WARNING"))] == 2
    assert found["cvm_process_cpu_ratio", ()] == 1.5 and found["cvm_process_memory_bytes", ()] == 2 * 2**20
    assert found["cvm_disk_free_bytes", ()] == 7_000_000
    assert found["cvm_gpu_utilization_ratio", (("gpu", "0"),)] == pytest.approx(0.87)
    assert ("cvm_eta_seconds", stage) not in found  # not known of a dead run: left out, not 0


def test_a_running_run_is_up(port: MetricsPort, make_run: Callable[..., Path]) -> None:
    from cvm_translator.runs.lock import RunLock

    root = make_run(until="distil")
    with RunLock(root / "run.lock"):
        show(port, root, MachineFigures(), [])
    found = ask(port)
    assert found["cvm_up", ()] == 1.0 and found["cvm_eta_seconds", (("stage", "distil"),)] >= 0
    assert not any(name.startswith(("cvm_process", "cvm_gpu", "cvm_alerts")) for name, _ in found)


def test_a_paused_run_is_up_and_paused(port: MetricsPort, make_run: Callable[..., Path]) -> None:
    from cvm_translator.runs.lock import RunLock

    root = make_run(until="distil")
    with RunLock(root / "run.lock"):
        with EventWriter(root / "logs" / "events.jsonl") as events:
            events.write("paused", step=1000, stage="distil", reason="it was asked to")
        show(port, root, MachineFigures(), [])
    found = ask(port)
    assert found["cvm_up", ()] == 1.0
    assert found["cvm_state", (("state", "paused"),)] == 1.0 and found["cvm_state", (("state", "running"),)] == 0.0


def test_a_run_that_has_not_begun(port: MetricsPort, tmp_path: Path) -> None:
    show(port, tmp_path, MachineFigures(), [])
    assert ask(port)["cvm_state", (("state", "never_started"),)] == 1.0


def test_hostile_names_stay_in_their_labels(port: MetricsPort, make_run: Callable[..., Path]) -> None:
    root = make_run(until="distil")
    name = 'x"} 1\ncvm_up 1\n# HELP \\ \x1b[31m\u202e'
    with EventWriter(root / "logs" / "events.jsonl") as events:
        events.write("stage_started", stage=name)
        events.write("validation", step=1, stage="distil", scores={name: 1.0}, teacher_scores={})
        events.write("verdict", step=1, stage="distil", verdict=name, action="keep")
    show(port, root)
    found = ask(port)
    assert found["cvm_up", ()] == 0.0
    labels = {value for _, pairs in found for _, value in pairs}
    assert all(label.isprintable() for label in labels) and any('x"} 1\\ncvm_up' in label for label in labels)


def test_a_port_that_is_taken_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        number = other.getsockname()[1]
        assert command_line(["monitor", str(tmp_path), "--metrics-port", str(number)]) == 1
    err = capsys.readouterr().err
    assert f"--metrics-port {number}" in err and "choose another port" in err and err.count("\n") == 1


def test_without_the_library_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    real = importlib.import_module

    def missing(name: str, *arguments: Any) -> Any:
        if name.startswith("prometheus_client"):
            raise ImportError("No module named 'prometheus_client'")
        return real(name, *arguments)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert command_line(["monitor", str(tmp_path), "--metrics-port", "0"]) == 1
    assert "pip install 'cvm-translator[prometheus]'" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["-1", "65536", "x"])
def test_no_port(number: str) -> None:
    with pytest.raises(SystemExit) as error:
        command_line(["monitor", "--metrics-port", number])
    assert error.value.code == 2
