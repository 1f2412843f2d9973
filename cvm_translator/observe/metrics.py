"""The run's figures for Prometheus, on a port of this machine.

Guarantees: an answer is drawn from the monitor's last look and reads no file; what is not known is left out rather than
shown as 0. Text in labels is printable and without secrets; labels come from fixed sets, but for the run's and the
stage's names. Needs the extra `prometheus`. The address is 127.0.0.1 unless another is asked for: there is no password.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cvm_translator.errors import CvmError, import_optional
from cvm_translator.observe.alerts import Alert
from cvm_translator.observe.describe import HELD_STATES
from cvm_translator.observe.history import History, of_stage
from cvm_translator.observe.machine import MachineFigures
from cvm_translator.observe.status import EXIT_CODES
from cvm_translator.observe.text import as_number
from cvm_translator.runs.text import printable

LOSSES = {"total": "recent_loss", "distillation": "recent_distillation_loss", "task": "recent_task_loss"}
Labels = Mapping[str, str]


class MetricsPort:
    """Answers GET /metrics until it is closed."""

    def __init__(self, host: str, port: int) -> None:
        client = import_optional("prometheus_client", "prometheus")
        self._collector = _Collector()
        registry = client.CollectorRegistry(auto_describe=False)
        registry.register(self._collector)
        try:
            self._server, self._thread = client.start_http_server(port, host, registry)
        except OSError as error:
            raise CvmError(
                f"--metrics-port {port}: {host}:{port} cannot be used ({error.strerror}): choose another port"
            ) from None
        self.address = f"http://{host}:{self._server.server_port}/metrics"

    def show(
        self, status: Mapping[str, Any], history: History, machine: MachineFigures, alerts: Sequence[Alert]
    ) -> None:
        """Answer with these figures from now on."""
        self._collector.samples = [*_run_samples(status, history), *_machine_samples(machine), *_alert_samples(alerts)]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


class _Sample:
    """One figure: its name without the prefix, its meaning, its labels and its value."""

    def __init__(self, name: str, meaning: str, value: Any, **labels: Any) -> None:
        self.name, self.meaning, self.value = f"cvm_{name}", meaning, as_number(value)
        self.labels = {key: printable(label)[:200] for key, label in labels.items()}


class _Collector:
    """Hands the newest samples to the library; exchanged whole, so an answer never mixes two looks."""

    def __init__(self) -> None:
        self.samples: list[_Sample] = []

    def collect(self) -> Iterator[Any]:
        core = import_optional("prometheus_client.core", "prometheus")
        families: dict[str, Any] = {}
        for sample in self.samples:
            if math.isnan(sample.value):
                continue
            if sample.name not in families:
                is_counter = sample.name.endswith("_total")
                kind = core.CounterMetricFamily if is_counter else core.GaugeMetricFamily
                families[sample.name] = kind(sample.name, sample.meaning, labels=list(sample.labels))
            families[sample.name].add_metric(list(sample.labels.values()), sample.value)
        yield from families.values()


def _run_samples(status: Mapping[str, Any], history: History) -> list[_Sample]:
    stage = status["stage"] or ""
    losses, validation = status["losses"] or {}, status["validation"] or {}
    checkpoint = status["checkpoint"] or {}
    shown = "teacher" if stage == "teacher" else "distil"
    best = [v for v in history.student_validations() if v["step"] == status["best_step"]]
    samples = [
        _Sample("up", "1 while the run's process is there.", float(status["state"] in HELD_STATES)),
        _Sample("run_info", "The run that is watched.", 1.0, run_dir=status["run_dir"], run_id=status["run_id"] or ""),
        *(
            _Sample("state", "1 for the state the run is in.", float(state == status["state"]), state=state)
            for state in EXIT_CODES
        ),
        _Sample("step", "Step of the stage's loop.", status["step"], stage=stage),
        _Sample("iterations", "Steps that the stage is to make.", status["num_iterations"], stage=stage),
        _Sample(
            "executed_steps_total", "Student's steps computed, thrown-away ones included.", status["executed_steps"]
        ),
        *(
            _Sample("loss", "Mean loss of the newest steps.", losses.get(key), stage=stage, part=part)
            for part, key in LOSSES.items()
        ),
        _Sample("learning_rate", "Of the newest step.", losses.get("learning_rate"), stage=stage),
        _Sample("quality_score", "Of the last validation; 1 is the teacher's.", validation.get("quality_score")),
        _Sample("best_quality_score", "Of the best validation.", best[-1].get("quality_score") if best else None),
        *(
            _Sample("score", "Score of the last validation.", value, metric=name, model=model)
            for model, scores in (("student", validation.get("scores")), ("teacher", validation.get("teacher_scores")))
            for name, value in (scores or {}).items()
        ),
        _Sample("steps_per_second", "Speed of the stage.", status["steps_per_second"], stage=stage),
        _Sample("utilisation_ratio", "Share of the processor's measured peak.", status["utilisation"], stage=stage),
        _Sample("tokens_per_second", "Speed of the stage.", status["tokens_per_second"], stage=stage),
        _Sample("eta_seconds", "Time that the stage still needs.", status["eta_seconds"], stage=stage),
        _Sample("idle_seconds", "Time without progress.", status["idle_seconds"]),
        _Sample("checkpoint_age_seconds", "Since the newest checkpoint.", checkpoint.get("age_seconds")),
        _Sample("rollbacks_total", "Rollbacks of the student.", len(of_stage(history.rollbacks, "distil"))),
        _Sample("restarts_total", "Starts after a process that had gone without a word.", len(history.restarts)),
        _Sample("warnings_total", "Warnings of the run.", status["num_warnings"]),
        _Sample("health_problems", "Notes on what is wrong now.", len(status["health"])),
    ]
    verdicts = Counter(str(event.get("verdict")) for event in of_stage(history.verdicts, shown))
    return samples + [_Sample("verdicts_total", "Verdicts, by name.", n, verdict=name) for name, n in verdicts.items()]


def _machine_samples(machine: MachineFigures) -> list[_Sample]:
    process = machine.process or {}
    samples = [
        _Sample("process_cpu_ratio", "Of one core.", as_number(process.get("cpu_percent")) / 100),
        _Sample("process_memory_bytes", "Of the run and its children.", as_number(process.get("memory_mib")) * 2**20),
        _Sample("disk_free_bytes", "On the disk of the run folder.", machine.disk_free_bytes),
    ]
    for gpu in machine.gpus:
        samples += [
            _Sample("gpu_utilization_ratio", "Of a card.", gpu.utilization_percent / 100, gpu=gpu.index),
            _Sample("gpu_memory_used_bytes", "Of a card.", gpu.memory_used_mib * 2**20, gpu=gpu.index),
            _Sample("gpu_memory_bytes", "Of a card.", gpu.memory_total_mib * 2**20, gpu=gpu.index),
        ]
    return samples


def _alert_samples(alerts: Sequence[Alert]) -> list[_Sample]:
    counts = Counter((alert.name, alert.level) for alert in alerts)
    return [
        _Sample("alerts_total", "Alerts that this monitor told.", number, alert=name, level=level)
        for (name, level), number in counts.items()
    ]
