"""A run folder as a real run leaves it, made from the event schema: two trainings, ten validations, one rollback."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from cvm_translator.observe.watch import RunWatch
from cvm_translator.runs.layout import RunLayout

START = datetime(2026, 3, 1, 8, 0, tzinfo=UTC)
HASH = "5d41402abc4b2a76b9719d911017c592ae9f0e1d2c3b4a5968778695a4b3c2d1"
PROBES = ("empty", "repetition", "copy", "length_ratio", "numbers", "placeholders", "wrong_language")
TEACHER = {"bleu": 34.6, "chrf": 56.9, "ter": 52.1, "rouge1": 61.0, "rouge2": 41.2, "rougeL": 58.8, "bertscore": 0.71}
TEACHER |= {"exact_match": 21.4, "perplexity": 9.8}


class EventsFile:
    """Writes events with a clock of its own, so that a folder is the same on every machine."""

    def __init__(self, path: Path, start: datetime = START) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.clock, self.lines = path, start, []

    def write(self, kind: str, *, step: int | None = None, attempt: int = 1, after: float = 0.4, **fields: Any) -> None:
        self.clock += timedelta(seconds=after)
        time = self.clock.isoformat(timespec="milliseconds")
        event = {"schema_version": 1, "time": time, "kind": kind, "step": step, "attempt": attempt}
        self.lines.append(json.dumps(event | fields, ensure_ascii=False, default=str))

    def close(self) -> None:
        with open(self.path, "a", encoding="utf-8") as stream:
            stream.writelines(line + "\n" for line in self.lines)
        self.lines = []


def _train(
    events: EventsFile, stage: str, step: int, total: int, attempt: int, executed: int, noise: random.Random
) -> None:
    warmup = total // 10
    rate = min(step / warmup, (total - step) / (total - warmup)) * (5e-4 if stage == "distil" else 1e-3)
    task = 2.1 + 6.5 * math.exp(-9 * step / total) + noise.gauss(0, 0.16)
    distillation = 1.2 + 9 * math.exp(-8 * step / total) + noise.gauss(0, 0.18)
    total_loss = task if stage == "teacher" else 0.8 * distillation + 0.2 * task
    skipped = step == total // 3
    events.write(
        "train", step=step, attempt=attempt, stage=stage, executed_step=executed, skipped=skipped,
        loss="nan" if skipped else total_loss, task_loss=task,
        distillation_loss=None if stage == "teacher" else distillation,
        accuracy=0.68 * (1 - math.exp(-6 * step / total)) + noise.gauss(0, 0.012),
        learning_rate=rate, grad_norm=0.9 + abs(noise.gauss(0, 0.3)), num_tokens=612,
    )  # fmt: skip


def _quality(step: int, total: int) -> float:
    return 0.965 * (1 - math.exp(-5.2 * step / total))


def _validate(
    events: EventsFile, step: int, total: int, attempt: int, noise: random.Random, worse: float = 0.0
) -> float:
    quality = _quality(step, total) * (1 - worse) + noise.gauss(0, 0.004)
    scores = {
        name: value * (2 - quality if name in ("ter", "perplexity") else quality) for name, value in TEACHER.items()
    }
    counts = {name: int(40 / (1 + 4 * step / total) * (1 + 9 * worse) + noise.randint(0, 6)) for name in PROBES}
    retentions = {name: quality + noise.gauss(0, 0.004) for name in ("bleu", "chrf", "ter", "bertscore", "rougeL")}
    events.write(
        "validation", step=step, attempt=attempt, after=31.0, seconds=30.8, stage="distil", scores=scores,
        teacher_scores=TEACHER, quality_score=quality, retentions=retentions, probes=counts | {"sentences": 2000},
        decode_tokens_per_second=2810.0,
    )  # fmt: skip
    return quality


def write_events(root: Path, *, total: int = 1000, until: str = "run_finished", rollback: bool = True) -> EventsFile:
    """The diary of a run with ten validations and, if asked for, a rollback after the seventh."""
    noise = random.Random(7)
    events = EventsFile(root / "logs" / "events.jsonl")
    stages = ["corpus", "tokenizer", "teacher", "distil", "quantise", "gate", "report"]
    events.write("run_started", run_id="r-20260301", pid=4242, num_iterations=total, stages=stages, config_sha256=HASH)
    for stage in stages[:2]:
        events.write("stage_started", stage=stage)
        events.write("stage_finished", stage=stage, seconds=41.0, skipped=False, summary={})
    events.write("stage_started", stage="teacher")
    for step in range(1, total // 2 + 1):
        _train(events, "teacher", step, total // 2, 1, step, noise)
    events.write(
        "validation",
        step=total // 2,
        stage="teacher",
        scores=TEACHER,
        teacher_scores={},
        quality_score=None,
        retentions={},
        probes={},
        decode_tokens_per_second=None,
        seconds=9.0,
    )
    events.write("stage_finished", stage="teacher", seconds=total * 0.2, skipped=False, summary={})
    events.write("stage_started", stage="distil")
    _distil(events, total, rollback, noise)
    if until == "distil":
        events.close()
        return events
    for stage in stages[3:]:
        events.write("stage_finished", stage=stage, seconds=12.0, skipped=False, summary={})
    fields = {
        "run_finished": {
            "exit_code": 0,
            "gate_passed": True,
            "halted": False,
            "executed_steps": 1100,
            "seconds": 5210.0,
        }
    }
    fields |= {"failed": {"message": "corpus.train: no such file"}, "stopped": {"signal": 15}}
    events.write(until, step=total, **fields[until])
    events.close()
    return events


def _distil(events: EventsFile, total: int, rollback: bool, noise: random.Random) -> None:
    every, step, attempt, best, executed = total // 10, 0, 1, 0, 0
    best_quality = 0.0
    while step < total:
        step, executed = step + 1, executed + 1
        _train(events, "distil", step, total, attempt, executed, noise)
        if step % 13 == 0:
            events.write(
                "progress", step=step, attempt=attempt, after=0.0, stage="distil", num_iterations=total,
                steps_per_second=2.5, tokens_per_second=1530.0, eta_seconds=(total - step) / 2.5, memory_mib=913.0,
                loss=2.5, distillation_loss=2.0, task_loss=4.5, utilisation=0.4,
            )  # fmt: skip
        if step % every:
            continue
        bad = rollback and attempt == 1 and step == 7 * every
        quality = _validate(events, step, total, attempt, noise, worse=0.19 if bad else 0.0)
        drop = 1 - quality / best_quality if best_quality else None
        name = "first" if not best else "degraded" if bad else "improved" if quality > best_quality else "healthy"
        if quality > best_quality:
            best, best_quality = step, quality
        events.write(
            "verdict", step=step, attempt=attempt, stage="distil", bits=16, verdict=name, drop=drop,
            drop_lower_bound=drop and drop - 0.02,
            margin=0.05, best_step=best, reason="quality below best", action="roll_back" if bad else "keep",
        )  # fmt: skip
        events.write(
            "checkpoint", step=step, attempt=attempt, stage="distil", path=f"checkpoints/checkpoint_{step}",
            is_best=best == step, num_bytes=61_000_000, seconds=0.6,
        )  # fmt: skip
        if bad:
            events.write(
                "rollback", step=step, attempt=attempt, stage="distil",
                reason="quality 18.2 % below the best, at least 16.2 %",
                from_step=step, to_step=best, rollback_number=1, learning_rate_factor=1.0, data_stream=1,
            )  # fmt: skip
            step, attempt = best, 2


def _interval(value: float, spread: float) -> dict[str, float]:
    return {"value": value, "low": value - spread, "high": value + spread}


def _scored(factor: float) -> dict[str, Any]:
    scores = {
        k: _interval(v * (2 - factor if k in ("ter", "perplexity") else factor), v * 0.03) for k, v in TEACHER.items()
    }
    names = ("quality_score", "bleu", "chrf", "ter", "bertscore", "rouge1", "rouge2", "rougeL")
    return {
        "scores": scores,
        "retentions": {name: _interval(factor + 0.004 * i, 0.014) for i, name in enumerate(names)},
    }


def final_report(total: int = 1000) -> dict[str, Any]:
    names = ("num_parameters", "num_bytes", "peak_memory_mib", "tokens_per_second")
    figures = {
        "teacher": (11_900_000, 47_600_000, 301.0, 1460.0),
        "float": (4_700_000, 18_900_000, 158.0, 4120.0),
        "int8": (4_700_000, 4_810_000, 149.0, 3890.0),
    }
    models = {model: dict(zip(names, values, strict=True)) for model, values in figures.items()}
    sample = {
        "source": "Die Datei „%(name)s“ konnte nicht gespeichert werden.",
        "reference": "The file “%(name)s” could not be saved.",
        "teacher": "The file “%(name)s” could not be saved.",
        "student": "File “%(name)s” could not be saved.",
    }
    return {
        "gate": {"passed": True, "failures": [], "thresholds": {"quality_score": 0.9, "bleu": 0.9, "chrf": 0.9}},
        "halted": False, "num_iterations": total, "executed_steps": int(total * 1.1), "best_step": total,
        "rollbacks": [{
            "step": 7 * total // 10, "to_step": 6 * total // 10, "learning_rate_factor": 1.0, "data_stream": 1,
            "reason": "quality 18.2 % below the best, at least 16.2 %",
        }],
        "test": {"teacher": {**_scored(1.0), "retentions": {}}, "float": _scored(0.966), "int8": _scored(0.957)},
        "unseen": {"teacher": {**_scored(0.71), "retentions": {}}, "float": _scored(0.66), "int8": _scored(0.65)},
        "gaps": {"teacher_to_float": {"bleu": -1.18, "chrf": -1.9}, "float_to_int8": {"bleu": -0.31, "chrf": -0.5}},
        "models": models,
        "samples": [sample, sample | {"source": "Speichern unter …", "teacher": "Save as…", "student": "Save as …",
                                      "reference": "Save as…"}],
        "worst": [sample | {"student": "The the the the the the", "score": 3.1}],
        "preflight": {
            "warnings": [], "effective_targets": 41.2, "gradient_ratio": 0.83, "smallest_detectable_drop": 0.081,
        },
        "seconds": {"corpus": 88.0, "tokenizer": 9.0, "teacher": 1810.0, "distil": 4205.0, "gate": 71.0},
        "corpus": {"train": 33120, "validation": 2000, "test": 2000, "unseen": 1000},
    }  # fmt: skip


CONFIG = {
    "seed": 13,
    "corpus": {"source_language": "de", "target_language": "en", "train": [{"format": "tsv", "path": "train.tsv"}]},
    "teacher": {"kind": "train", "training": {"num_iterations": 500, "validate_every_steps": 100}},
    "distillation": {"num_iterations": 1000, "temperature": 2.0, "alpha": 0.8, "beta": 0.2, "learning_rate": 0.0005},
    "validation": {"every_steps": 100, "metrics": ["bleu", "chrf", "ter", "rouge", "bertscore"]},
    "guard": {"enabled": True, "quality_threshold": 0.9, "degradation_threshold": 0.05},
    "quantization": {"method": "qat", "bits": 8, "start_fraction": 0.66},
}
FILTERS = {
    "read": 61234,
    "kept": 38120,
    "dropped": {"empty": 112, "identical": 8120, "too long": 410, "near duplicate": 14472},
}
MANIFEST = {
    "files": {f"{name}.tsv": {"sha256": HASH, "num_pairs": 2000} for name in ("train", "validation", "test", "unseen")}
}
ENVIRONMENT = {"python": "3.11.9", "torch": "2.13.0", "platform": "Linux x86_64", "num_threads": 2, "device": "cpu"}


def write_files(root: Path, report: dict[str, Any] | None = None, total: int = 1000) -> None:
    """Everything beside the events."""
    files = {
        "environment.json": ENVIRONMENT, "corpus/filters.json": FILTERS, "corpus/manifest.json": MANIFEST,
        "reports/final_report.json": report or final_report(total),
        "student/metadata.json": {"source_language": "de", "target_language": "en", "run_id": "r-20260301"},
    }  # fmt: skip
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    config = CONFIG | {"distillation": CONFIG["distillation"] | {"num_iterations": total}}  # type: ignore[operator]
    (root / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Builds a run folder: `make_run(until="distil" | "run_finished" | "failed" | "stopped", total=…, report=…)`."""

    def make(name: str = "run", *, report: dict[str, Any] | None = None, total: int = 1000, **options: Any) -> Path:
        root = tmp_path / name
        write_events(root, total=total, **options)
        write_files(root, report, total)
        return root

    return make


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing is most of a report's time; leave it out where the text alone is judged."""
    for name in ("training", "validation", "errors", "retention", "sizes"):
        monkeypatch.setattr(f"cvm_translator.observe.plots.plot_{name}", lambda *args: None)


@pytest.fixture
def watch_run() -> Iterator[Callable[..., RunWatch]]:
    """Builds watches and closes them."""
    watches: list[RunWatch] = []

    def build(root: Path, **options: Any) -> RunWatch:
        watches.append(RunWatch(RunLayout(root), **options))
        return watches[-1]

    yield build
    for watch in watches:
        watch.close()
