"""The monitor's live view, drawn with rich from a status and a history.

Foreign text is made printable and put into `Text` objects, never into markup.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cvm_translator.observe import describe
from cvm_translator.observe.alerts import Alert
from cvm_translator.observe.history import History, of_stage
from cvm_translator.observe.machine import MachineFigures
from cvm_translator.observe.text import (
    as_number,
    format_bytes,
    format_count,
    format_percent,
    format_score,
    format_seconds,
    is_known,
    ordered_metrics,
    short_metric_name,
)
from cvm_translator.runs.text import printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

TICKS = "▁▂▃▄▅▆▇█"
MAIN_METRICS = ("bleu", "chrf", "ter", "bertscore")
STATE_STYLES = {"running": "bold green", "done": "bold green", "failed": "bold red", "dead": "bold red"}
LEVEL_STYLES = {"INFO": "green", "WARNING": "yellow", "CRITICAL": "bold red"}


def sparkline(values: Sequence[float], width: int = 48) -> str:
    """The values as a line of bars, averaged into at most `width` of them; NaN left out."""
    known = [value for value in values if math.isfinite(value)]
    if not known:
        return ""
    num_bars = min(width, len(known))
    edges = [index * len(known) // num_bars for index in range(num_bars + 1)]
    means = [sum(known[low:high]) / (high - low) for low, high in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(TICKS) - 1) / (high - low) if high > low else 0.0
    return "".join(TICKS[round((mean - low) * scale)] for mean in means)


def build_view(
    status: Mapping[str, Any],
    history: History,
    machine: MachineFigures,
    alerts: Sequence[Alert],
    log_lines: Sequence[str],
    height: int = 50,
) -> RenderableType:
    """Everything on one screen of `height` lines: where the run is, how well it does, what went wrong."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    is_low = height < 42
    state = status["state"]
    title = Text.assemble((f" {state} ", STATE_STYLES.get(state, "bold yellow")), printable(status["run_dir"]), " ")
    parts: list[RenderableType] = [*_progress(status)]
    parts += [Text(f"! {printable(note['message'])}", style="bold red") for note in status["health"]]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in _lines(status, history, machine):
        if text:
            grid.add_row(name, Text(printable(text)))
    parts += [Text(), grid]
    if history.student_validations():
        parts += [Text(), _scores(status, history, only=MAIN_METRICS if is_low else None)]
    told = [f"{alert.time[:19].replace('T', ' ')} {alert.message}" for alert in alerts]
    styles = [LEVEL_STYLES.get(alert.level, "") for alert in alerts]
    if alerts:
        shown = list(zip(told, styles, strict=True))[-2 if is_low else -5 :]
        parts += [Text(), *(Text(printable(text), style=style) for text, style in shown)]
    if log_lines and height >= 30:
        shown_lines = log_lines[-2 if is_low else -6 :]
        parts.append(Text())
        parts += [Text(printable(line), style="dim", no_wrap=True, overflow="ellipsis") for line in shown_lines]
    return Panel(Group(*parts), title=title, title_align="left", border_style="dim", padding=(0 if is_low else 1, 2))


def _progress(status: Mapping[str, Any]) -> list[RenderableType]:
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    stages, done = status["stages"] or [], status["stages_finished"]
    line = Text()
    for stage in stages:
        style = "green" if stage in done else "bold cyan" if stage == status["stage"] else "dim"
        mark = "✓ " if stage in done else "▸ " if stage == status["stage"] else "· "
        line.append(f"{mark}{printable(stage)}  ", style=style)
    total, step = status["num_iterations"], status["step"]
    if not total or step is None:
        return [line if stages else Text(describe.headline(status))]
    bar = Table.grid(padding=(0, 2))
    progress = ProgressBar(total=total, completed=step, width=30, complete_style="cyan", finished_style="green")
    bar.add_row(progress, Text(describe.describe_step(status)))
    return [line, bar]


def _lines(status: Mapping[str, Any], history: History, machine: MachineFigures) -> list[tuple[str, str]]:
    losses, checkpoint = status["losses"] or {}, status["checkpoint"] or {}
    curve = history.curves.get(status["stage"] or "")
    trend = sparkline(curve.columns["loss"][-2000:]) if curve else ""
    quality = [as_number(v.get("quality_score")) for v in history.student_validations()]
    rate = losses.get("learning_rate")
    rollbacks = [f"{r['from_step']} -> {r['to_step']} ({r['reason']})" for r in status["rollbacks"]]
    rest = "  no step for " + format_seconds(status["idle_seconds"]) if (status["idle_seconds"] or 0) > 30 else ""
    return [
        ("speed", describe.describe_speed(status) + (rest if status["state"] == "running" else "")),
        ("loss", describe.describe_losses(losses)),
        ("", trend),
        ("learning rate", f"{as_number(rate):.3g}" if is_known(rate) else ""),
        ("quality", f"{sparkline(quality)}  best at step {status['best_step']}" if len(quality) > 1 else ""),
        ("verdict", _describe_verdicts(status, history)),
        ("rollbacks", "; ".join(rollbacks)),
        (
            "checkpoint",
            f"step {checkpoint['step']}, {format_seconds(checkpoint['age_seconds'])} ago" if checkpoint else "",
        ),
        (
            "warnings",
            f"{status['num_warnings']}, last: {status['last_warning']['message']}" if status["last_warning"] else "",
        ),
        ("machine", _describe_machine(machine)),
    ]


def _describe_machine(machine: MachineFigures) -> str:
    process = machine.process
    parts = [f"CPU {process['cpu_percent']:.0f} %, memory {format_count(process['memory_mib'])} MiB"] if process else []
    parts += [
        f"GPU {gpu.index} {format_count(gpu.utilization_percent)} %"
        f" ({format_count(gpu.memory_used_mib)} of {format_count(gpu.memory_total_mib)} MiB, {gpu.name})"
        for gpu in machine.gpus
    ]
    return ", ".join([*parts, f"disk {format_bytes(machine.disk_free_bytes)} free"])


def _describe_verdicts(status: Mapping[str, Any], history: History) -> str:
    """The last verdict, and how many there were of each."""
    shown = of_stage(history.verdicts, "teacher" if status["stage"] == "teacher" else "distil")
    counts = Counter(str(event.get("verdict")).replace("_", " ") for event in shown)
    told = ", ".join(f"{number} {name}" for name, number in counts.most_common())
    return f"{describe.describe_verdict(status['verdict'])}  ({told})" if status["verdict"] else ""


def _scores(status: Mapping[str, Any], history: History, only: Sequence[str] | None) -> Table:
    """The last validation beside the best one and the teacher."""
    from rich.table import Table

    validations = history.student_validations()
    last = validations[-1]
    best = next((v for v in validations if v["step"] == status["best_step"]), {})
    teacher = last.get("teacher_scores") or {}
    table = Table(box=None, header_style="dim", padding=(0, 2), pad_edge=False)
    table.add_column("")
    for title in (f"last ({last['step']})", f"best ({best.get('step', '–')})", "teacher", "kept"):
        table.add_column(title, justify="right")
    table.add_row(
        "Quality score",
        format_percent(last.get("quality_score")),
        format_percent(best.get("quality_score")),
        "100.0 %",
        "",
    )
    for key in ordered_metrics(last.get("scores") or {}):
        if only is not None and key not in only:
            continue
        values = [(source or {}).get(key) for source in (last.get("scores"), best.get("scores"), teacher)]
        kept = format_percent((last.get("retentions") or {}).get(key), missing="")
        table.add_row(short_metric_name(printable(key)), *(format_score(key, value) for value in values), kept)
    return table
