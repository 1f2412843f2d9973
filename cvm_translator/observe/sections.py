"""The report's first half: the answer, the comparison, the guard. Facts in, blocks out.

Every function is pure. What was not measured says `not measured`; no number is made up or carried over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from cvm_translator.observe.advice import advise
from cvm_translator.observe.describe import describe_verdict
from cvm_translator.observe.document import Block, Bullets, Cell, Fold, Table, Text, Verdict
from cvm_translator.observe.facts import Facts, dig, gather_advice_facts
from cvm_translator.observe.history import of_stage
from cvm_translator.observe.status import find_state
from cvm_translator.observe.text import (
    NOT_MEASURED,
    as_number,
    format_bytes,
    format_count,
    format_number,
    format_percent,
    format_score,
    format_seconds,
    is_known,
    metric_name,
    ordered_metrics,
    short_metric_name,
)

MODEL_NAMES = {"teacher": "Teacher", "float": "Student, float"}
GATED = ("quality_score", "bleu", "chrf")


def model_name(key: str) -> str:
    return MODEL_NAMES.get(key, f"Student, {key}")


def gated_metrics(facts: Facts) -> list[str]:
    return list(dig(facts.final, "gate.thresholds") or GATED)


def build_title(facts: Facts) -> tuple[str, str]:
    source, target = facts.setting("corpus.source_language"), facts.setting("corpus.target_language")
    pair = f": {source} → {target}" if source and target else ""
    started = facts.history.run_started or {}
    parts = [f"Run {started['run_id']}" if started.get("run_id") else "", f"folder {facts.layout.root}"]
    parts.append(f"started {str(started['time'])[:16].replace('T', ' ')} UTC" if started.get("time") else "")
    return f"Distillation report{pair}", ", ".join(part for part in parts if part)


def build_verdict(facts: Facts) -> Verdict:
    gate = facts.final.get("gate") or {}
    halted = _describe_halt(facts.final)
    if "passed" not in gate:
        state = find_state(facts.history, None)
        words = {
            "failed": "the run failed before it",
            "stopped": "the run was stopped before it",
            "done": "the run had none",
        }
        return Verdict(
            "Not gated", f"No gate yet: {words.get(state, 'the run has not reached it')}.{halted}", "neutral"
        )
    retentions = dig(facts.final, f"test.{facts.deployed}.retentions") or {}
    kept = ", ".join(
        f"{format_percent(retentions[name].get('value'))} of its {short_metric_name(name)}"
        if name != "quality_score"
        else f"{format_percent(retentions[name].get('value'))} of the teacher's quality score"
        for name in gated_metrics(facts)
        if name in retentions
    )
    asked = f"at least {format_percent(facts.threshold, 0)} of each is asked"
    summary = (
        f"The {facts.deployed} student keeps {kept} on the test set; {asked}." if kept else f"Retention {NOT_MEASURED}."
    )
    if gate["passed"]:
        return Verdict("Gate passed" + (", halted" if halted else ""), summary + halted, "good")
    failures = "; ".join(str(text) for text in gate.get("failures") or [])
    short = [_shortfall(facts, name, retentions) for name in gated_metrics(facts)]
    by = ", ".join(text for text in short if text)
    title = "Gate failed" + (f": {by}" if by else "") + (", halted" if halted else "")
    return Verdict(title, f"{summary} {failures}.{halted}" if failures else summary + halted, "bad")


def _describe_halt(final: Mapping[str, Any]) -> str:
    if not final.get("halted"):
        return ""
    reason = f" ({final['halt_reason']})" if final.get("halt_reason") else ""
    return f" The guard halted the run before its last step{reason}; this is its best model."


def _shortfall(facts: Facts, name: str, retentions: Mapping[str, Any]) -> str:
    asked = as_number(dig(facts.final, f"gate.thresholds.{name}", facts.threshold))
    missing = asked - as_number((retentions.get(name) or {}).get("value"))
    return f"{short_metric_name(name)} {100 * missing:.1f} points short" if missing > 0 else ""


def build_advice(facts: Facts) -> list[Block]:
    warnings = [str(text) for text in dig(facts.final, "preflight.warnings") or []]
    advice = advise(gather_advice_facts(facts))
    items = [*advice, *(f"Before training: {text}" for text in warnings)]
    return [Text("What the numbers advise:"), Bullets(items)] if items else []


def build_comparison(facts: Facts) -> list[Block]:
    models, test = facts.final.get("models") or {}, facts.final.get("test") or {}
    names = [name for name in ("teacher", "float", facts.deployed) if name in models or name in test]
    names = list(dict.fromkeys(names))
    if not names:
        return [Text(f"Teacher and student: {NOT_MEASURED}.")]
    rows = _size_rows(models, names) + list_score_rows(test, names) + _retention_rows(facts, test, names)
    note = "Scores on the test set, which no decision has seen; in brackets the confidence interval."
    return [Table(["", *(model_name(name) for name in names)], rows), Text(note)]


def _size_rows(models: Mapping[str, Any], names: Sequence[str]) -> list[list[str | Cell]]:
    def row(
        title: str, key: str, show: Callable[[float], str], faster: bool = False, of: Mapping[str, Any] = models
    ) -> list[str | Cell]:
        cells: list[str | Cell] = [title]
        base = as_number((of.get("teacher") or {}).get(key))
        for name in names:
            value = as_number((of.get(name) or {}).get(key))
            ratio = value / base if faster else base / value if value else float("nan")
            factor = (
                f" ({ratio:.1f}× {'faster' if faster else 'smaller'})" if ratio >= 1.05 and name != "teacher" else ""
            )
            cells.append(f"{show(value)}{factor}" if is_known(value) else Cell(NOT_MEASURED, "muted"))
        return cells

    def show_memory(value: float) -> str:
        return f"{value:,.0f} MiB"

    bare = {name: as_number((models.get(name) or {}).get("baseline_memory_mib")) for name in names}
    used = {name: {"used": as_number((models.get(name) or {}).get("peak_memory_mib")) - bare[name]} for name in names}
    above = (
        [row("Peak memory above the bare process", "used", show_memory, of=used)]
        if any(map(is_known, bare.values()))
        else []
    )
    return [
        row("Parameters", "num_parameters", format_count),
        row("Size on disk", "num_bytes", format_bytes),
        row("Peak memory", "peak_memory_mib", show_memory),
        *above,
        row("Decoding speed", "tokens_per_second", lambda value: f"{value:,.0f} tokens/s", faster=True),
    ]


def show_score(key: str, measured: Any) -> str | Cell:
    """A score as `33.1 [31.9, 34.3]`; also takes a bare number."""
    data = measured if isinstance(measured, Mapping) else {"value": measured}
    if not is_known(data.get("value")):
        return Cell("–", "muted")
    text = format_score(key, data["value"])
    if is_known(data.get("low")) and is_known(data.get("high")):
        text += f" [{format_score(key, data['low'])}, {format_score(key, data['high'])}]"
    return text


def list_score_rows(test: Mapping[str, Any], names: Sequence[str]) -> list[list[str | Cell]]:
    found = {key for name in names for key in (dig(test, f"{name}.scores") or {})}
    return [
        [metric_name(key), *(show_score(key, dig(test, f"{name}.scores.{key}")) for name in names)]
        for key in ordered_metrics(found)
    ]


def _retention_rows(facts: Facts, test: Mapping[str, Any], names: Sequence[str]) -> list[list[str | Cell]]:
    found = {key for name in names for key in (dig(test, f"{name}.retentions") or {})}
    gated = gated_metrics(facts)
    rows: list[list[str | Cell]] = []
    for key in ordered_metrics(found):
        mark = " (gated)" if key in gated else ""
        row: list[str | Cell] = [Cell(f"Retention: {short_metric_name(key)}{mark}", "strong" if mark else "")]
        for name in names:
            data = dig(test, f"{name}.retentions.{key}") or {}
            judged = key in gated and name == facts.deployed
            row.append(
                show_retention(data, facts.threshold if judged else None) if name != "teacher" else Cell("–", "muted")
            )
        rows.append(row)
    return rows


def show_retention(data: Mapping[str, Any], threshold: float | None) -> str | Cell:
    value = as_number(data.get("value"))
    if not is_known(value):
        return Cell("–", "muted")
    text = format_percent(value)
    if is_known(data.get("low")) and is_known(data.get("high")):
        text += f" [{100 * as_number(data['low']):.1f}, {100 * as_number(data['high']):.1f}]"
    return text if threshold is None else Cell(text, "good" if value >= threshold else "bad")


def build_gaps(facts: Facts) -> list[Block]:
    """Teacher to float student, and float student to quantised student, per metric."""
    titles = {
        "teacher_to_float": "Teacher → float student (distillation)",
        f"float_to_{facts.deployed}": f"Float → {facts.deployed} (quantisation)",
    }
    gaps = {key: value for key, value in (facts.final.get("gaps") or {}).items() if isinstance(value, Mapping)}
    if not gaps:
        return [Text(f"Gaps: {NOT_MEASURED}.")]
    metrics = ordered_metrics({key for gap in gaps.values() for key in gap})
    rows = [[metric_name(key), *(_show_change(key, gap.get(key)) for gap in gaps.values())] for key in metrics]
    headers = ["Change of", *(titles.get(key, key.replace("_", " ")) for key in gaps)]
    return [Table(headers, rows), Text("What distilling cost, apart from what the smaller numbers cost.")]


def _show_change(key: str, measured: Any) -> str | Cell:
    shown = show_score(key, measured)
    return f"+{shown}" if isinstance(shown, str) and not shown.startswith("-") else shown


def build_stage_times(facts: Facts) -> list[Block]:
    seconds = facts.final.get("seconds") or {
        name: event.get("seconds") for name, event in facts.history.stages_finished.items()
    }
    rows = [[str(name), format_seconds(value)] for name, value in seconds.items() if is_known(value)]
    if not rows:
        return []
    used = [f"{name} {fmean(shares):.0%}" for name, shares in facts.history.utilisations.items()]
    told = f"Share of the processor's measured peak that the training steps used, on average: {', '.join(used)}."
    return [Fold("Time taken by each stage", [Table(["Stage", "Time"], rows), *([Text(told)] if used else [])])]


def build_validation_table(facts: Facts) -> list[Block]:
    history = facts.history
    gone = of_stage(history.discarded_validations, "distil")
    verdicts = {(v.get("step"), v.get("attempt")): v for v in of_stage(history.verdicts, "distil")}
    shown = sorted([*history.student_validations(), *gone], key=lambda v: (v.get("attempt") or 1, v.get("step") or 0))
    if not shown:
        return []
    metrics = [
        key for key in ("bleu", "chrf", "ter", "bertscore") if any(key in (v.get("scores") or {}) for v in shown)
    ]
    best, rows = history.best_step(), []
    for v in shown:
        verdict = verdicts.get((v.get("step"), v.get("attempt"))) or {}
        name = str(verdict.get("verdict") or "–").replace("_", " ")
        tone = "bad" if name in ("degraded", "emergency") else "good" if name in ("first", "improved") else ""
        step = f"{format_count(v.get('step'))}{' ★' if v.get('step') == best and v not in gone else ''}"
        cells: list[str | Cell] = [step, format_count(v.get("attempt") or 1), format_percent(v.get("quality_score"))]
        cells += [format_score(key, (v.get("scores") or {}).get(key)) for key in metrics]
        rows.append([*cells, Cell(name, tone)])
    headers = ["Step", "Attempt", "Quality score", *(short_metric_name(key) for key in metrics), "Verdict"]
    return [Table(headers, rows), Text("★ marks the best validation, whose weights are delivered.")]


def build_guard(facts: Facts) -> list[Block]:
    final, history = facts.final, facts.history
    planned = final.get("num_iterations") or (history.run_started or {}).get("num_iterations")
    executed = final.get("executed_steps") or history.executed_steps
    text = f"{format_count(executed)} steps were executed for {format_count(planned)} in the student's own history."
    if final.get("num_skipped"):
        text += f" {format_count(final['num_skipped'])} batches were skipped (non-finite loss or a spike)."
    best = final.get("best_step", history.best_step())
    blocks: list[Block] = [Text(f"{text} The best validation was at step {format_count(best)}.")]
    smallest = dig(final, "preflight.smallest_detectable_drop")
    if is_known(smallest):
        blocks.append(
            Text(f"The smallest true drop that the guard detects with 99 % power here is {format_percent(smallest)}.")
        )
    if not facts.rollbacks:
        return [*blocks, Text("There was no rollback.")]
    rows = [
        [
            format_count(r.get("from_step", r.get("step"))),
            format_count(r.get("to_step")),
            format_number(r.get("learning_rate_factor"), 3),
            format_count(r.get("data_stream")),
            str(r.get("reason")),
        ]
        for r in facts.rollbacks
    ]
    table = Table(["From step", "Back to", "Learning rate ×", "Data stream", "Reason"], rows, numeric=False)
    warned = [
        v for v in of_stage(history.verdicts, "distil") if v.get("verdict") in ("degraded", "warning", "emergency")
    ]
    notes = [describe_verdict(v) for v in warned]
    if notes:
        blocks += [Text("Verdicts that were not all well:"), Bullets(notes)]
    return [*blocks, Text("Rollbacks:"), table]
