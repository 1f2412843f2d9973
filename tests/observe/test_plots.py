"""Plots are PNGs made from what is there, and None where nothing is."""

from __future__ import annotations

import math
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from cvm_translator.observe import plots
from cvm_translator.observe.history import History, TrainCurve, read_history


def _size(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def test_smoothing_is_a_mean_that_leaves_nan_out() -> None:
    assert plots.smooth([1.0, 2.0, 3.0, 4.0], 3) == [1.5, 2.0, 3.0, 3.5]
    assert plots.smooth([1.0, math.nan, 3.0], 3) == [1.0, 2.0, 3.0]
    assert math.isnan(plots.smooth([math.nan, math.nan], 3)[0])


def test_every_plot_of_a_real_run(make_run: Callable[..., Path]) -> None:
    history = read_history(make_run() / "logs" / "events.jsonl")
    drawn = [
        plots.plot_training(history.curves["distil"], history.rollbacks, 660),
        plots.plot_validation(history),
        plots.plot_errors([(v["step"], v["probes"]) for v in history.student_validations()], {"empty": 3}),
        plots.plot_retention({"bleu": {"value": 0.8, "low": 0.7, "high": 0.9}, "chrf": {"value": 1.1}}, 0.9, ["bleu"]),
        plots.plot_sizes({"teacher": {"num_parameters": 5}, "int8": {"num_parameters": None, "num_bytes": 10}}),
    ]
    for png in drawn:
        assert png is not None
        width, height = _size(png)
        assert width > 500 and height > 100


def test_nothing_to_draw() -> None:
    assert plots.plot_training(None) is None
    assert plots.plot_training(TrainCurve()) is None
    assert plots.plot_validation(History()) is None
    assert plots.plot_errors([]) is None
    assert plots.plot_retention({"bleu": {}}, 0.9) is None
    assert plots.plot_sizes({}) is None


@pytest.mark.parametrize("loss", ["nan", "inf", None, -1.0])
def test_odd_losses_can_be_drawn(loss: object) -> None:
    history = History()
    for step in range(1, 30):
        history.add({"kind": "train", "stage": "distil", "step": step, "loss": loss, "task_loss": 1.0, "attempt": 1})
    assert plots.plot_training(history.curves["distil"]) is not None


def test_a_single_validation_with_names_from_elsewhere() -> None:
    history = History()
    history.add(
        {"kind": "validation", "step": 10, "scores": {"bleu": 3, "<b>$x^$": 0.1}, "probes": {"$\\frac": 1, "n": 0}}
    )
    assert plots.plot_validation(history) is not None
    assert (
        plots.plot_errors([(v["step"], v["probes"]) for v in history.student_validations()], {"empty": 3}) is not None
    )


def test_drawing_in_threads_leaves_the_settings_alone(make_run: Callable[..., Path]) -> None:
    import matplotlib

    history = read_history(make_run() / "logs" / "events.jsonl")
    before, results = dict(matplotlib.rcParams), []
    threads = [threading.Thread(target=lambda: results.append(plots.plot_validation(history))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1
    assert dict(matplotlib.rcParams) == before
