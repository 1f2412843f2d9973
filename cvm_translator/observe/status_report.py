"""The monitor's status report: the state of a run as it goes on, as Markdown and as a page that renews itself.

Writes `monitor/status_report.md`, `.html` and `monitor/plots/*.png`, each whole or not at all.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cvm_translator.observe import describe, plots
from cvm_translator.observe.document import (
    Block,
    Bullets,
    Cell,
    Document,
    Heading,
    Picture,
    Table,
    Text,
    Verdict,
    to_html,
    to_markdown,
)
from cvm_translator.observe.history import History, of_stage
from cvm_translator.observe.status import read_run, summarise
from cvm_translator.observe.text import (
    format_percent,
    format_score,
    format_seconds,
    is_known,
    ordered_metrics,
    short_metric_name,
)
from cvm_translator.runs.atomic import write_bytes, write_text
from cvm_translator.runs.layout import RunLayout

NUM_ALERTS_SHOWN = 20


def write_status_report(run_dir: str | Path, refresh_seconds: int = 300, idle_seconds: float | None = None) -> Path:
    """Write the status report of a run folder anew; returns the Markdown file (the page lies beside it).

    `idle_seconds`: see `summarise`.
    """
    layout = RunLayout(Path(run_dir))
    history, holder, supervisor = read_run(layout)
    status = summarise(layout, history, holder, time.time(), idle_seconds, supervisor)
    alerts = layout.monitor / "alerts.log"
    lines = alerts.read_text(encoding="utf-8", errors="replace").splitlines() if alerts.exists() else []
    document = build_status_document(status, history, lines)
    for picture in document.pictures():
        write_bytes(layout.monitor / "plots" / f"{picture.name}.png", picture.png)
    markdown = layout.monitor / "status_report.md"
    write_text(markdown, to_markdown(document))
    write_text(markdown.with_suffix(".html"), to_html(document, max(10, refresh_seconds)))
    return markdown


def build_status_document(status: Mapping[str, Any], history: History, alert_lines: Sequence[str]) -> Document:
    tones = {"done": "good", "running": "neutral", "failed": "bad", "dead": "bad"}
    tone = tones.get(status["state"], "neutral")
    if status["state"] == "done" and (status["result"] or {}).get("gate_passed") is False:
        tone = "bad"
    now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")[:19]
    step = describe.describe_step(status)
    detail = f"Stage {status['stage'] or 'none yet'}" + (f", step {step}." if step else ".")
    blocks: list[Block] = [Verdict(describe.headline(status), detail, tone)]
    if status["health"]:
        blocks += [Heading("Health"), Bullets([note["message"] for note in status["health"]])]
    rows = [[name, text] for name, text in describe.status_lines(status) if text]
    blocks += [Table(["", ""], rows, numeric=False)] if rows else []
    blocks += _validation(status)
    rollbacks = of_stage(history.rollbacks, "distil")
    pictures = [
        ("training", "Training of the student", plots.plot_training(history.curves.get("distil"), rollbacks)),
        ("teacher_training", "Training of the teacher", plots.plot_training(history.curves.get("teacher"))),
        ("validation", "Scores on the validation set", plots.plot_validation(history)),
    ]
    shown: list[Block] = [Picture(name, title, png) for name, title, png in pictures if png is not None]
    blocks += [Heading("Curves"), *shown] if shown else []
    if alert_lines:
        blocks += [Heading("Alerts"), Bullets(list(reversed(alert_lines[-NUM_ALERTS_SHOWN:])))]
    return Document("Status report", f"{status['run_dir']}, as of {now} UTC", blocks)


def _validation(status: Mapping[str, Any]) -> list[Block]:
    validation = status["validation"]
    if not validation:
        return []
    scores, teacher = validation["scores"] or {}, validation["teacher_scores"] or {}
    retentions = validation["retentions"] or {}
    rows: list[list[str | Cell]] = [
        [
            short_metric_name(key),
            format_score(key, scores[key]),
            format_score(key, teacher.get(key)),
            format_percent(retentions.get(key)),
        ]
        for key in ordered_metrics(scores)
    ]
    quality = (
        f", quality score {format_percent(validation['quality_score'])}"
        if is_known(validation["quality_score"])
        else ""
    )
    best = f", best at step {status['best_step']}" if status["best_step"] is not None else ""
    age = f", checkpoint {format_seconds(status['checkpoint']['age_seconds'])} old" if status["checkpoint"] else ""
    return [
        Heading("Last validation"),
        Text(f"At step {validation['step']} of {validation['stage'] or 'distil'}{quality}{best}{age}."),
        Table(["", "Student", "Teacher", "Kept"], rows),
    ]
