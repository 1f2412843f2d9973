"""The report's plots, as PNG bytes.

Every function takes plain numbers, draws on a Figure of its own (no pyplot, no global state, safe in threads) and
returns the bytes, or None when there is nothing to draw. Colours mean the same everywhere: the teacher is grey, the
float student teal, the deployed student blue, what a rollback threw away pale, trouble red.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cvm_translator.observe.history import Event, History, TrainCurve
from cvm_translator.observe.text import as_number, is_known, ordered_metrics, printable, short_metric_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, PALE = "#1f2933", "#66727f", "#e4e8ec", "#c9d3dd"
TEACHER, FLOAT, STUDENT, BAD, MARK = "#7b8794", "#159a8c", "#2563eb", "#d64545", "#8d5bd6"
TASK, DISTILLATION = "#e08e0b", "#159a8c"
MODELS = {"teacher": ("Teacher", TEACHER), "float": ("Student, float", FLOAT), "int8": ("Student, int8", STUDENT)}
SMOOTHING_SHARE = 0.01
"""Width of the training curves' moving average, as a share of their length."""
MAX_POINTS = 2000

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.parse_math": False,
    "axes.edgecolor": PALE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
}


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, hspace=0.06, wspace=0.04)  # type: ignore[union-attr,call-arg]
    return figure, list(axes.flat)


def _png(figure: Figure) -> bytes:
    import matplotlib

    stream = io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """One legend for all panels, above them and so never over the data."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), handlelength=1.8, columnspacing=1.8)


def _steps_axis(axes: Axes, last_step: float, label: bool = True) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(0, max(1.0, last_step) * 1.015)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if label:
        axes.set_xlabel("step")


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


def _thinned(*columns: Sequence[float]) -> list[Sequence[float]]:
    stride = max(1, math.ceil(len(columns[0]) / MAX_POINTS))
    return [column[::stride] for column in columns]


def plot_training(curve: TrainCurve | None, rollbacks: Sequence[Event] = (), quantised_from: int | None = None) -> bytes | None:
    """Loss and its two parts, accuracy and learning rate by step; rollbacks and the start of fake quantisation marked."""
    if curve is None or len(curve) < 2:
        return None
    rows, gone = curve.kept_rows(), curve.discarded_rows()
    steps = [curve.steps[row] for row in rows]
    last_step = max(curve.steps)
    figure, (losses, accuracy, rate) = _figure(3, 1, 8.6, 7.6)
    panels = [(losses, "loss", "Total", STUDENT), (losses, "distillation_loss", "Distillation", DISTILLATION)]
    panels += [(losses, "task_loss", "Task", TASK), (accuracy, "accuracy", "", STUDENT), (rate, "learning_rate", "", STUDENT)]
    handles, labels = [], []
    width = max(5, int(len(rows) * SMOOTHING_SHARE))
    for axes, name, label, colour in panels:
        column = curve.columns[name]
        values = [column[row] for row in rows]
        if not any(math.isfinite(value) for value in values):
            continue
        smoothing = 1 if name == "learning_rate" else width
        if gone:
            lost = [math.nan if curve.skipped[row] else column[row] for row in gone]
            xs, ys = _thinned([curve.steps[row] for row in gone], smooth(lost, smoothing))
            axes.plot(xs, ys, color=colour, alpha=0.35, linewidth=1.4, linestyle=(0, (2, 1.5)))
        if smoothing > 1 and name in ("loss", "accuracy"):
            axes.plot(*_thinned(steps, values), color=colour, alpha=0.16, linewidth=0.6)
        (line,) = axes.plot(*_thinned(steps, smooth(values, smoothing)), color=colour)
        if label:
            handles.append(line)
            labels.append(label)
    _finish_loss_axis(losses, curve, rows)
    losses.set_title("Loss per token")
    losses.set_ylabel("nats")
    accuracy.set_title("Top-1 accuracy against the reference, reference prefix given")
    accuracy.set_ylabel("share of tokens")
    rate.set_title("Learning rate")
    rate.set_ylabel("per step")
    rate.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    for axes in (losses, accuracy, rate):
        _steps_axis(axes, last_step, label=axes is rate)
        _mark_rollbacks(axes, rollbacks, text=axes is losses)
        if quantised_from and 0 < quantised_from < last_step:
            axes.axvline(quantised_from, color=MARK, linewidth=1.1, linestyle=(0, (1, 2)))
            if axes is losses:
                _annotate(axes, quantised_from, "fake quantisation on", MARK, row=1)
    if gone:
        handles.append(_proxy(STUDENT, alpha=0.35, linestyle=(0, (2, 1.5))))
        labels.append("Thrown away by a rollback")
    _legend(figure, handles, labels)
    return _png(figure)


def _proxy(colour: str, **options: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, **options)


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


def _annotate(axes: Axes, step: float, text: str, colour: str, row: int) -> None:
    """A label beside a vertical line, at the top, on the side with room."""
    right = step > 0.7 * axes.get_xlim()[1]
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


def plot_validation(history: History) -> bytes | None:
    """Every metric by step with the teacher's line, the best validation and what a rollback threw away."""
    kept = history.student_validations()
    if not kept:
        return None
    gone = [v for v in history.discarded_validations if isinstance(v.get("step"), int)]
    found = {name for v in kept for name, value in (v.get("scores") or {}).items() if is_known(value)}
    names = [name for name in ("quality_score", *ordered_metrics(found)) if name == "quality_score" or name in found]
    if not any(is_known(v.get("quality_score")) for v in kept):
        names.remove("quality_score")
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    figure, panels = _figure(rows, columns, 9.6, 0.7 + 2.25 * rows)
    best_step = _best_step(history)
    last_step = max(v["step"] for v in kept + gone)
    for axes, name in zip(panels, names, strict=False):
        _plot_metric(axes, name, kept, gone, best_step)
        _steps_axis(axes, last_step, label=axes in panels[len(names) - columns : len(names)])
    for axes in panels[len(names) :]:
        axes.remove()
    handles = [_proxy(STUDENT, marker="o", markersize=4), _proxy(TEACHER, linestyle=(0, (5, 2)))]
    handles.append(_proxy(STUDENT, marker="*", markersize=11, linestyle="none"))
    labels = ["Student, quantised", "Teacher", "Best"]
    if gone:
        handles.append(_proxy(BAD, marker="x", markersize=6, linestyle="none"))
        labels.append("Rolled back")
    _legend(figure, handles, labels)
    return _png(figure)


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
        axes.plot([best_step], [best], color=STUDENT, marker="*", markersize=12, linestyle="none", zorder=5)
    teacher = 1.0 if name == "quality_score" else _teacher_score(kept, name)
    if math.isfinite(teacher):
        axes.axhline(teacher, color=TEACHER, linestyle=(0, (5, 2)), linewidth=1.4)
    axes.set_title(short_metric_name(name))
    units = {"quality_score": "share of the teacher's", "exact_match": "% of sentences", "perplexity": "lower is better"}
    units |= {"ter": "lower is better", "bertscore": "rescaled F1"}
    axes.set_ylabel(units.get(name, "score"))
    axes.margins(y=0.12)


def _metric(validation: Event, name: str) -> Any:
    return validation.get("quality_score") if name == "quality_score" else (validation.get("scores") or {}).get(name)


def _teacher_score(validations: Sequence[Event], name: str) -> float:
    known = [as_number((v.get("teacher_scores") or {}).get(name)) for v in reversed(validations)]
    return next((value for value in known if math.isfinite(value)), math.nan)


def _best_step(history: History) -> int | None:
    steps = [v["best_step"] for v in history.verdicts if isinstance(v.get("best_step"), int)]
    return steps[-1] if steps else None


def plot_retention(retentions: Mapping[str, Mapping[str, Any]], threshold: float, gated: Sequence[str] = ()) -> bytes | None:
    """Share of the teacher's score that the student keeps, per metric, with its confidence interval and the gate."""
    names = [name for name in ordered_metrics(retentions) if is_known((retentions[name] or {}).get("value"))]
    if not names:
        return None
    figure, (axes,) = _figure(1, 1, 8.2, 0.9 + 0.42 * len(names))
    values = [100 * as_number(retentions[name]["value"]) for name in names]
    lows = [100 * as_number(retentions[name].get("low")) for name in names]
    highs = [100 * as_number(retentions[name].get("high")) for name in names]
    places = range(len(names))
    failed = [name in gated and value < 100 * threshold for name, value in zip(names, values, strict=True)]
    colours = [BAD if bad else STUDENT if name in gated else "#8fb0f5" for name, bad in zip(names, failed, strict=True)]
    axes.barh(places, values, height=0.62, color=colours)
    for place, value, low, high in zip(places, values, lows, highs, strict=True):
        edge = value
        if math.isfinite(low) and math.isfinite(high):
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.errorbar(value, place, xerr=error, color=INK, capsize=3, linewidth=1.3)
            edge = max(value, high)
        axes.annotate(f"{value:.1f} %", (edge, place), xytext=(7, 0), textcoords="offset points", va="center", fontsize=9)
    axes.axvline(100 * threshold, color=BAD, linewidth=1.3, linestyle=(0, (4, 2)))
    axes.axvline(100, color=TEACHER, linewidth=1.1)
    top = ("data", "axes fraction")
    for at, text, colour in ((100 * threshold, f"gate {100 * threshold:.0f} %", BAD), (100.0, "teacher", TEACHER)):
        side = {"ha": "right", "xytext": (-3, 3)} if at < 100 else {"ha": "left", "xytext": (3, 3)}
        axes.annotate(text, (at, 1.0), xycoords=top, textcoords="offset points", color=colour, fontsize=8.5, **side)
    names_shown = [short_metric_name(name) + (" *" if name in gated else "") for name in names]
    axes.set_yticks(list(places), names_shown)
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    known = [low for low in lows if math.isfinite(low)] + values
    axes.set_xlim(min(0.0, *known) if min(known) < 50 else 50, max([100.0, *values, *[h for h in highs if math.isfinite(h)]]) * 1.08)
    axes.set_xlabel("% of the teacher's score on the test set, with confidence interval" + ("   (* gated)" if gated else ""))
    return _png(figure)


def plot_errors(validations: Sequence[Event], ignored: Sequence[str] = ("sentences", "num_sentences")) -> bytes | None:
    """Degenerate outputs by category over the validations: one small panel each, so that rare ones show too."""
    counts = [(v["step"], v.get("probes") or {}) for v in validations]
    names = sorted({n for _, probes in counts for n, value in probes.items() if is_known(value) and n not in ignored})
    if not names or not counts:
        return None
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure, panels = _figure(rows, columns, 9.6, 0.3 + 1.95 * rows)
    from matplotlib.ticker import MaxNLocator

    for index, (axes, name) in enumerate(zip(panels, names, strict=False)):
        points = [(step, as_number(probes.get(name))) for step, probes in counts if is_known(probes.get(name))]
        steps, values = zip(*points, strict=True)
        axes.fill_between(steps, values, color=STUDENT, alpha=0.13, linewidth=0)
        axes.plot(steps, values, color=STUDENT, marker="o", markersize=3)
        axes.set_title(printable(name).replace("_", " "))
        axes.set_ylim(0, max(1.0, max(values) * 1.2))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=max(values) > 1 or max(values) == 0))
        _steps_axis(axes, max(step for step, _ in counts), label=index >= len(names) - columns)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
        if index % columns == 0:
            axes.set_ylabel("sentences")
    for axes in panels[len(names) :]:
        axes.remove()
    return _png(figure)


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
    figure, panels = _figure(1, len(kinds), 2.6 * len(kinds), 2.5)
    for axes, (key, title, scale, unit) in zip(panels, kinds, strict=True):
        values = [as_number(models[name].get(key)) / scale for name in present]
        heights = [value if math.isfinite(value) else 0.0 for value in values]
        axes.bar(range(len(present)), heights, width=0.66, color=[MODELS[name][1] for name in present])
        for place, value in enumerate(values):
            text = "–" if not math.isfinite(value) else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
            axes.annotate(text, (place, heights[place]), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=9)
        axes.set_title(f"{title} ({unit})")
        axes.set_xticks([])
        axes.set_yticks([])
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        axes.set_ylim(0, (max(heights) or 1.0) * 1.16)
    from matplotlib.patches import Patch

    _legend(figure, [Patch(color=MODELS[name][1]) for name in present], [MODELS[name][0] for name in present])
    return _png(figure)
