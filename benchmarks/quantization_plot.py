"""The plot of the quantisation benchmark: quality against bytes, with labels that never lie on each other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.quantization_rows import FLOAT
from cvm_translator.observe import plot_style

TICKS_MIB = [tick * 2.0**power for power in range(-4, 14) for tick in (1.0, 1.25, 1.5)]
NEAR = 1.25
"""Points whose sizes follow each other within this ratio have their labels in one column."""


def place_labels(points: Sequence[tuple[float, float, str]], line_height: float) -> dict[str, tuple[float, float]]:
    """Where the label of each point (size, BLEU, name) begins: points of nearly one size share a column of labels."""
    columns: list[list[tuple[float, float, str]]] = []
    for point in sorted(points):
        if not columns or point[0] > NEAR * columns[-1][-1][0]:
            columns.append([])
        columns[-1].append(point)
    places: dict[str, tuple[float, float]] = {}
    for column in columns:
        height = -math.inf
        for _, bleu, name in sorted(column, key=lambda point: point[1]):
            height = max(bleu, height + line_height)
            places[name] = (1.07 * column[-1][0], height)
    return places


@plot_style.styled
def plot_quality(rows: Mapping[str, Mapping[str, Any]]) -> bytes:
    """BLEU against bytes, every row a point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8))
    axes = figure.subplots()
    points = [(row["num_bytes"] / 2**20, row["scores"]["bleu"], name) for name, row in rows.items()]
    sizes, scores = [point[0] for point in points], [point[1] for point in points]
    line_height = max(max(scores) - min(scores), 0.1) / 20
    places = place_labels(points, line_height)
    for size, bleu, name in points:
        axes.plot(size, bleu, "o", color=plot_style.FLOAT if name == FLOAT else plot_style.STUDENT)
        line = {"arrowstyle": "-", "linewidth": 0.5, "color": plot_style.MUTED, "relpos": (0, 0.5)}
        axes.annotate(name, (size, bleu), places[name], fontsize=8, verticalalignment="center", arrowprops=line)
    axes.set_xscale("log", base=2)
    ticks = [tick for tick in TICKS_MIB if min(sizes) / 1.2 <= tick <= max(sizes) * 1.2]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(sizes) / 1.1, max(sizes) * 1.3)
    heights = [*scores, *(height for _, height in places.values())]
    axes.set_ylim(min(heights) - 2 * line_height, max(heights) + 2 * line_height)
    axes.set_xlabel("weights, MiB")
    axes.set_ylabel("BLEU on the test set")
    axes.set_title("Quality against bytes")
    return plot_style.to_png(figure)
