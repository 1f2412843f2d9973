"""The report's plots, as PNG bytes.

Every function takes plain numbers, draws on a Figure of its own (no pyplot, no global state, safe in threads) and
returns the bytes, or None when there is nothing to draw. Colours mean the same everywhere: the teacher is grey, the
float student teal, the deployed student blue, what a rollback threw away pale, trouble red.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cvm_translator.observe.history import Event, History, TrainCurve, of_stage
from cvm_translator.observe.plot_style import (
    BAD,
    DISTILLATION,
    INK,
    MARK,
    MODELS,
    STUDENT,
    TASK,
    TEACHER,
    add_legend,
    build_figure,
    build_handle,
    plot_label,
    style_steps_axis,
    styled,
    to_png,
)
from cvm_translator.observe.text import as_number, error_name, is_known, ordered_metrics, short_metric_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING_SHARE = 0.01
"""Width of the training curves' moving average, as a share of their length."""
MAX_POINTS = 2000
SHOWN_RETENTIONS = (40.0, 130.0)
"""Percent; a metric on which the teacher is hardly better than nothing can lie anywhere."""


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Centred moving average over `width` values, NaN left out of it; shorter windows at the ends."""
    half, result = max(0, width // 2), []
    totals, counts = [0.0], [0]
    for value in values:
        known = math.isfinite(value)
        totals.append(totals[-1] + (value if known else 0.0))
        counts.append(counts[-1] + known)
    for index in range(len(values)):
        low, high = max(0, index - half), min(len(values), index + half + 1)
        count = counts[high] - counts[low]
        result.append((totals[high] - totals[low]) / count if count else math.nan)
    return result


def thin(*columns: Sequence[float]) -> list[Sequence[float]]:
    stride = max(1, math.ceil(len(columns[0]) / MAX_POINTS))
    return [column[::stride] for column in columns]


def choose_columns(num_panels: int) -> int:
    """Three to five columns: as many as leave the fewest places empty."""
    return min((3, 4, 5), key=lambda columns: (-num_panels % columns, -columns)) if num_panels > 3 else num_panels


@styled
def plot_training(
    curve: TrainCurve | None, rollbacks: Sequence[Event] = (), quantised_from: int | None = None
) -> bytes | None:
    """Loss and its parts, accuracy and learning rate by step; rollbacks and the start of fake quantisation marked."""
    if curve is None or len(curve) < 2:
        return None
    rows, gone = curve.kept_rows(), curve.discarded_rows()
    steps = [curve.steps[row] for row in rows]
    last_step = max(curve.steps)
    figure, (losses, accuracy, rate) = build_figure(3, 1, 8.6, 7.6)
    panels = [(losses, "loss", "Total", STUDENT), (losses, "distillation_loss", "Distillation", DISTILLATION)]
    panels += [
        (losses, "task_loss", "Task", TASK),
        (accuracy, "accuracy", "", STUDENT),
        (rate, "learning_rate", "", STUDENT),
    ]
    handles, labels = [], []
    width = max(5, int(len(rows) * SMOOTHING_SHARE))
    for axes, name, label, colour in panels:
        column = curve.columns[name]
        values = [math.nan if curve.skipped[row] else column[row] for row in rows]
        if not any(math.isfinite(value) for value in values):
            continue
        if name in ("distillation_loss", "task_loss") and not curve.is_distillation():
            continue  # the task loss alone: it is the total
        smoothing = 1 if name == "learning_rate" else width
        if gone:
            lost = [math.nan if curve.skipped[row] else column[row] for row in gone]
            xs, ys = thin([curve.steps[row] for row in gone], smooth(lost, smoothing))
            axes.plot(xs, ys, color=colour, alpha=0.35, linewidth=1.4, linestyle=(0, (2, 1.5)))
        if smoothing > 1 and name in ("loss", "accuracy"):
            axes.plot(*thin(steps, values), color=colour, alpha=0.16, linewidth=0.6)
        (line,) = axes.plot(*thin(steps, smooth(values, smoothing)), color=colour)
        if label:
            handles.append(line)
            labels.append(label)
    _finish_loss_axis(losses, curve, rows)
    losses.set_title("Loss per token")
    losses.set_ylabel("nats")
    accuracy.set_title("Top-1 accuracy against the reference, reference prefix given")
    accuracy.set_ylabel("share of tokens")
    rate.set_title("Schedule")
    rate.set_ylabel("learning rate")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axes in (losses, accuracy, rate):
        style_steps_axis(axes, last_step, label=axes is rate)
        _mark_rollbacks(axes, rollbacks, text=axes is losses)
        if quantised_from and 1 < quantised_from < last_step:
            axes.axvline(quantised_from, color=MARK, linewidth=1.1, linestyle=(0, (1, 2)))
            if axes is losses:
                _annotate(axes, quantised_from, "fake quantisation from here", MARK, row=1, limit=0.35)
    if gone:
        handles.append(build_handle(STUDENT, alpha=0.35, linestyle=(0, (2, 1.5))))
        labels.append("Thrown away by a rollback")
    if len(labels) > 1:
        add_legend(figure, handles, labels)
    return to_png(figure)


def _finish_loss_axis(axes: Axes, curve: TrainCurve, rows: Sequence[int]) -> None:
    """Scale to what most steps show: the first steps and single spikes may leave the top of the panel."""
    names = ("loss", "distillation_loss", "task_loss")
    values = sorted(v for name in names for row in rows if math.isfinite(v := curve.columns[name][row]))
    if values:
        top = values[min(len(values) - 1, int(0.995 * len(values)))]
        axes.set_ylim(0 if values[0] >= 0 else None, top * 1.12 or None)


def _mark_rollbacks(axes: Axes, rollbacks: Sequence[Event], text: bool) -> None:
    for rollback in rollbacks:
        start, back = as_number(rollback.get("from_step", rollback.get("step"))), as_number(rollback.get("to_step"))
        if not (math.isfinite(start) and math.isfinite(back)):
            continue
        axes.axvspan(back, start, color=BAD, alpha=0.07, linewidth=0)
        axes.axvline(start, color=BAD, linewidth=1.1)
        if text:
            _annotate(axes, start, f"rolled back to {back:,.0f}", BAD, row=0)


def _annotate(axes: Axes, step: float, text: str, colour: str, row: int, limit: float = 0.7) -> None:
    """A label beside a vertical line, at the top: on its right, or on its left beyond `limit` of the width."""
    right = step > limit * axes.get_xlim()[1]
    axes.annotate(
        text,
        (step, 0.94 - 0.11 * row),
        xycoords=("data", "axes fraction"),
        xytext=(-5 if right else 5, 0),
        textcoords="offset points",
        ha="right" if right else "left",
        va="center",
        color=colour,
        fontsize=8.5,
    )


@styled
def plot_validation(history: History) -> bytes | None:
    """Every metric by step with the teacher's line, the best validation and what a rollback threw away."""
    kept = history.student_validations()
    if not kept:
        return None
    gone = [v for v in of_stage(history.discarded_validations, "distil") if isinstance(v.get("step"), int)]
    found = {name for v in kept for name, value in (v.get("scores") or {}).items() if is_known(value)}
    names = [name for name in ("quality_score", *ordered_metrics(found)) if name == "quality_score" or name in found]
    if not any(is_known(v.get("quality_score")) for v in kept):
        names.remove("quality_score")
    columns = choose_columns(len(names))
    rows = math.ceil(len(names) / columns)
    figure, panels = build_figure(rows, columns, 2.3 * max(columns, 3), 0.7 + 2.1 * rows)
    best_step = history.best_step()
    last_step = max(v["step"] for v in kept + gone)
    for axes, name in zip(panels, names, strict=False):
        _plot_metric(axes, name, kept, gone, best_step)
        style_steps_axis(axes, last_step, label=axes in panels[len(names) - columns : len(names)], num_ticks=5)
    for axes in panels[len(names) :]:
        axes.remove()
    handles = [build_handle(STUDENT, marker="o", markersize=4), build_handle(TEACHER, linestyle=(0, (5, 2)))]
    handles.append(build_handle(STUDENT, marker="*", markersize=11, linestyle="none"))
    labels = ["Student, as deployed", "Teacher", "Best"]
    if gone:
        handles.append(build_handle(BAD, marker="x", markersize=6, linestyle="none"))
        labels.append("Rolled back")
    add_legend(figure, handles, labels)
    return to_png(figure)


def _plot_metric(axes: Axes, name: str, kept: Sequence[Event], gone: Sequence[Event], best_step: int | None) -> None:
    def values(validations: Sequence[Event]) -> list[tuple[int, float]]:
        pairs = [(v["step"], as_number(_metric(v, name))) for v in validations]
        return [(step, value) for step, value in pairs if math.isfinite(value)]

    points, lost = values(kept), values(gone)
    if points:
        axes.plot(*zip(*points, strict=True), color=STUDENT, marker="o", markersize=3.6)
    if lost:
        axes.plot(*zip(*lost, strict=True), color=BAD, marker="x", markersize=6, linestyle="none", markeredgewidth=1.8)
    best = dict(points).get(best_step) if best_step is not None else None
    if best is not None and best_step is not None:
        axes.plot(
            [best_step], [best], color=STUDENT, marker="*", markersize=12, linestyle="none", zorder=5, clip_on=False
        )
    teacher = 1.0 if name == "quality_score" else _teacher_score(kept, name)
    if math.isfinite(teacher):
        axes.axhline(teacher, color=TEACHER, linestyle=(0, (5, 2)), linewidth=1.4)
    axes.set_title(plot_label(short_metric_name(name)))
    units = {
        "quality_score": "share of the teacher's",
        "exact_match": "% of sentences",
        "perplexity": "lower is better",
    }
    units |= {"ter": "lower is better", "bertscore": "rescaled F1"}
    axes.set_ylabel(units.get(name, "score"))
    axes.margins(y=0.12)


def _metric(validation: Event, name: str) -> Any:
    return validation.get("quality_score") if name == "quality_score" else (validation.get("scores") or {}).get(name)


def _teacher_score(validations: Sequence[Event], name: str) -> float:
    known = [as_number((v.get("teacher_scores") or {}).get(name)) for v in reversed(validations)]
    return next((value for value in known if math.isfinite(value)), math.nan)


_BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 9, "annotation_clip": False}


@styled
def plot_retention(
    retentions: Mapping[str, Mapping[str, Any]], threshold: float, gated: Sequence[str] = ()
) -> bytes | None:
    """Share of the teacher's score that the student keeps, per metric, with its confidence interval and the gate."""
    names = [name for name in ordered_metrics(retentions) if is_known((retentions[name] or {}).get("value"))]
    if not names:
        return None
    figure, (axes,) = build_figure(1, 1, 8.6, 1.0 + 0.36 * len(names))
    axes.axvline(100 * threshold, color=BAD, linewidth=1.3, linestyle=(0, (4, 2)))
    axes.axvline(100, color=TEACHER, linewidth=1.3)
    edges = [100.0, 100 * threshold]
    for place, name in enumerate(names):
        value, low, high = (100 * as_number(retentions[name].get(key)) for key in ("value", "low", "high"))
        text, colour = f"{value:.1f} %", STUDENT if name in gated else "#8fb0f5"
        if name in gated and value < 100 * threshold:
            colour = BAD
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([low, high], [place, place], color=colour, linewidth=3.2, alpha=0.55, solid_capstyle="butt")
            text += f"  [{low:.1f}, {high:.1f}]"
            edges += [low, high]
        axes.plot([value], [place], color=colour, marker="o", markersize=8, linestyle="none")
        axes.annotate(text, (1.0, place), xycoords=("axes fraction", "data"), xytext=(8, 0), **_BESIDE)
        edges.append(value)
    low, high = max(min(edges), SHOWN_RETENTIONS[0]), min(max(edges), SHOWN_RETENTIONS[1])
    room = 0.06 * (high - low)
    axes.set_xlim(low - room, high + room)
    for place, name in enumerate(names):  # what lies beyond the shown range is an arrow at its edge
        value = 100 * as_number(retentions[name]["value"])
        if not low - room <= value <= high + room:
            at, marker = (high + room / 2, ">") if value > high else (low - room / 2, "<")
            axes.plot([at], [place], color=STUDENT if name in gated else "#8fb0f5", marker=marker, markersize=8)
    for at, text, colour, side in (
        (100 * threshold, f"gate {100 * threshold:.0f} % ", BAD, "right"),
        (100.0, " teacher", TEACHER, "left"),
    ):
        axes.annotate(
            text, (at, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points",
            color=colour, fontsize=8.5, ha=side if threshold <= 1 else "center",
        )  # fmt: skip
    labels = [plot_label(short_metric_name(name)) + (" *" if name in gated else "") for name in names]
    axes.set_yticks(range(len(names)), labels)
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel("% of the teacher's score on the test set" + ("   (* judged by the gate)" if gated else ""))
    return to_png(figure)


@styled
def plot_errors(
    counts: Sequence[tuple[int, Mapping[str, Any]]], teacher: Mapping[str, Any] | None = None
) -> bytes | None:
    """Faulty outputs by category over the validations: one small panel each, so that rare ones show too.

    `counts` holds a step and its number of sentences by category; `teacher` the teacher's numbers.
    """
    names = sorted({name for _, found in counts for name, value in found.items() if is_known(value)})
    if not names or not counts:
        return None
    columns = choose_columns(len(names))
    rows = math.ceil(len(names) / columns)
    figure, panels = build_figure(rows, columns, 2.5 * max(columns, 3), 0.3 + 1.95 * rows)
    from matplotlib.ticker import MaxNLocator

    for index, (axes, name) in enumerate(zip(panels, names, strict=False)):
        points = [(step, as_number(found.get(name))) for step, found in counts if is_known(found.get(name))]
        steps, values = zip(*points, strict=True)
        axes.fill_between(steps, values, color=STUDENT, alpha=0.13, linewidth=0)
        axes.plot(steps, values, color=STUDENT, marker="o", markersize=3)
        axes.set_title(plot_label(error_name(name)))
        peak = max(values)
        level = as_number((teacher or {}).get(name))
        if math.isfinite(level):
            axes.axhline(level, color=TEACHER, linestyle=(0, (5, 2)), linewidth=1.4)
            peak = max(peak, level)
        axes.set_ylim(0, max(1.0, peak * 1.2))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True, min_n_ticks=1))
        style_steps_axis(axes, max(step for step, _ in counts), label=index >= len(names) - columns, num_ticks=5)
        if index % columns == 0:
            axes.set_ylabel("sentences")
    for axes in panels[len(names) :]:
        axes.remove()
    if teacher:
        handles = [build_handle(STUDENT, marker="o", markersize=4), build_handle(TEACHER, linestyle=(0, (5, 2)))]
        add_legend(figure, handles, ["Student, as deployed", "Teacher"])
    return to_png(figure)


@styled
def plot_sizes(models: Mapping[str, Mapping[str, Any]]) -> bytes | None:
    """Parameters, bytes, memory and speed of the teacher and both students."""
    present = [name for name in MODELS if models.get(name)]
    if not present:
        return None
    kinds = [
        ("num_parameters", "Parameters", 1e6, "million"),
        ("num_bytes", "Size on disk", 2**20, "MiB"),
        ("peak_memory_mib", "Peak memory", 1.0, "MiB"),
        ("tokens_per_second", "Decoding speed", 1.0, "tokens/s"),
    ]
    kinds = [kind for kind in kinds if any(is_known(models[name].get(kind[0])) for name in present)]
    if not kinds:
        return None
    figure, panels = build_figure(1, len(kinds), 2.6 * len(kinds), 2.5)
    for axes, (key, title, scale, unit) in zip(panels, kinds, strict=True):
        values = [as_number(models[name].get(key)) / scale for name in present]
        heights = [value if math.isfinite(value) else 0.0 for value in values]
        axes.bar(range(len(present)), heights, width=0.66, color=[MODELS[name][1] for name in present])
        for place, value in enumerate(values):
            text = "–" if not math.isfinite(value) else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
            axes.annotate(
                text, (place, heights[place]), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9
            )
        axes.set_title(f"{title} ({unit})")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(0, (max(heights) or 1.0) * 1.16)
    from matplotlib.patches import Patch

    add_legend(figure, [Patch(color=MODELS[name][1]) for name in present], [MODELS[name][0] for name in present])
    return to_png(figure)
