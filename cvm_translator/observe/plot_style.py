"""One look for all plots: colours, type, axes and legends.

Plots are drawn on a Figure of their own (no pyplot) and one at a time, since matplotlib keeps its settings for the
whole process; they are put back afterwards.
"""

from __future__ import annotations

import functools
import io
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from cvm_translator.runs.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID, PALE = "#1f2933", "#66727f", "#e4e8ec", "#c9d3dd"
TEACHER, FLOAT, STUDENT, BAD, MARK = "#7b8794", "#159a8c", "#2563eb", "#d64545", "#8d5bd6"
TASK, DISTILLATION = "#e08e0b", "#159a8c"
MODELS = {
    "teacher": ("Teacher", TEACHER),
    "float": ("Student, float", FLOAT),
    **{name: (f"Student, {name}", STUDENT) for name in ("int8", "int4", "float16", "mixed")},
}
STYLE: dict[Any, Any] = {
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


MAX_LABEL_LENGTH = 40
_lock = threading.Lock()
Plot = TypeVar("Plot", bound=Callable[..., "bytes | None"])


def styled(plot: Plot) -> Plot:
    """Draw under this module's style; one plot at a time, since matplotlib keeps its settings for the whole process."""

    @functools.wraps(plot)
    def styled(*args: Any, **kwargs: Any) -> bytes | None:
        import matplotlib

        with _lock, matplotlib.rc_context(STYLE):
            return plot(*args, **kwargs)

    return styled  # type: ignore[return-value]


def build_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1, hspace=0.06, wspace=0.04)  # type: ignore[union-attr,call-arg]
    return figure, list(axes.flat)


def to_png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box in its place says the same
        figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def plot_label(name: str) -> str:
    """Foreign text as a label: printable, and no longer than a panel is wide."""
    text = printable(name)
    return text if len(text) <= MAX_LABEL_LENGTH else text[: MAX_LABEL_LENGTH - 1] + "…"


def add_legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """One legend for all panels, above them and so never over the data."""
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), handlelength=1.8, columnspacing=1.8)


def style_steps_axis(axes: Axes, last_step: float, label: bool = True, num_ticks: int = 8) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(0, max(1.0, last_step) * 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=num_ticks, integer=True))
    thousands = last_step >= 2000
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value / 1000:g}k" if thousands and value else f"{value:g}")
    )
    if label:
        axes.set_xlabel("step")


def build_handle(colour: str, **options: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, **options)
