"""What did a run spend on validations and checkpoints, and did its speed and memory stay as they were?

All of it is read from the events of a run that has ended. Shares are of the wall time of the whole run and of the stage
alone; speed and memory are those of the stage's second tenth and of its last, speed before fake quantisation begins,
which makes steps slower.

    python -m benchmarks.validation --run distillation_output_small
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
from cvm_translator.config import load_config
from cvm_translator.observe.plot_style import STUDENT, TASK, build_figure, style_steps_axis, styled, to_png
from cvm_translator.runs import atomic
from cvm_translator.runs.events import read_events, sum_stage_seconds
from cvm_translator.runs.layout import RunLayout

NAME = "validation"
STAGES = ("teacher", "distil")
MAX_VALIDATION_SHARE, MAX_CHECKPOINT_SHARE = 0.10, 0.01
MAX_SLOWER, MAX_MORE_MEMORY = 1.1, 1.1
PARTS = 10

Event = dict[str, Any]


def measure_stage(
    events: Sequence[Event], stage: str, stage_seconds: Mapping[str, float], last_step: float
) -> dict[str, Any]:
    """The figures of one training stage, speeds up to `last_step`."""
    run_seconds = sum(stage_seconds.values())
    own = [event for event in events if event.get("stage") == stage]
    progress = [event for event in own if event["kind"] == "progress"]
    if len(progress) < 2 * PARTS:
        raise BenchmarkError(f"stage {stage} told its progress only {len(progress)} times: name a longer run")
    seconds = stage_seconds[stage]
    validation_seconds = [event["seconds"] for event in own if event["kind"] == "validation"]
    checkpoint_seconds = [event["seconds"] for event in own if event["kind"] == "checkpoint"]
    size = len(progress) // PARTS

    def medians(name: str, chosen: Sequence[Event]) -> list[float]:
        return [statistics.median(event[name] for event in part) for part in (chosen[size : 2 * size], chosen[-size:])]

    return {
        "seconds": seconds,
        "num_steps": max(event["step"] for event in progress),
        "num_validations": len(validation_seconds),
        "validation_seconds": statistics.median(validation_seconds),
        "validation_share_of_stage": sum(validation_seconds) / seconds,
        "validation_share_of_run": sum(validation_seconds) / run_seconds,
        "num_checkpoints": len(checkpoint_seconds),
        "checkpoint_seconds": statistics.median(checkpoint_seconds),
        "checkpoint_share_of_stage": sum(checkpoint_seconds) / seconds,
        "steps_per_second": medians("steps_per_second", [event for event in progress if event["step"] <= last_step]),
        "memory_mib": medians("memory_mib", progress),
        "curve": {name: [event[name] for event in progress] for name in ("step", "steps_per_second", "memory_mib")},
    }


def measure(run: Path) -> dict[str, Any]:
    layout = RunLayout(run)
    if not layout.final_report.exists():
        raise BenchmarkError(f"--run {run} has no final report: name the folder of a run that has ended")
    events = list(read_events(layout.events))
    stage_seconds = sum_stage_seconds(events)
    trained = {event["stage"] for event in events if event["kind"] == "progress"}
    config = load_config(layout.config)
    rounds_from = math.inf  # where training begins to see the rounding, a step is another one
    if config.quantization.method in ("qat", "progressive"):
        rounds_from = config.quantization.start_fraction * config.distillation.num_iterations
    last_steps = {"teacher": math.inf, "distil": rounds_from}
    stages = {
        stage: measure_stage(events, stage, stage_seconds, last_steps[stage]) for stage in STAGES if stage in trained
    }
    total = sum(stage["validation_share_of_run"] for stage in stages.values())
    return {
        "run": run.name,
        "seconds": sum(stage_seconds.values()),
        "processor": atomic.read_json(layout.environment)["processor"],
        "stages": stages,
        "validation_share": total,
        "failures": check(stages, total),
    }


def check(stages: dict[str, dict[str, Any]], validation_share: float) -> dict[str, list[str]]:
    def over(limit: float, ratios: dict[str, float]) -> list[str]:
        return [f"{name}: {ratio:.2f}" for name, ratio in ratios.items() if ratio > limit]

    slower = {name: stage["steps_per_second"][0] / stage["steps_per_second"][1] for name, stage in stages.items()}
    larger = {name: stage["memory_mib"][1] / stage["memory_mib"][0] for name, stage in stages.items()}
    shares = {name: stage["checkpoint_share_of_stage"] for name, stage in stages.items()}
    return {
        f"validations take under {MAX_VALIDATION_SHARE:.0%} of the run": over(
            MAX_VALIDATION_SHARE, {"all": validation_share}
        ),
        f"checkpoints take under {MAX_CHECKPOINT_SHARE:.0%} of each stage": over(MAX_CHECKPOINT_SHARE, shares),
        f"steps get at most {MAX_SLOWER:g} times slower from the second tenth to the last": over(MAX_SLOWER, slower),
        f"memory grows at most {MAX_MORE_MEMORY:g} times from the second tenth to the last": over(
            MAX_MORE_MEMORY, larger
        ),
    }


@styled
def plot(stages: dict[str, dict[str, Any]]) -> bytes:
    """Speed and memory over the steps of each stage."""
    figure, panels = build_figure(2, len(stages), 4.6 * len(stages), 5.0)
    for column, (name, stage) in enumerate(stages.items()):
        curve = stage["curve"]
        for row, (figures, label, colour) in enumerate(
            (("steps_per_second", "steps a second", STUDENT), ("memory_mib", "memory, MiB", TASK))
        ):
            axes = panels[row * len(stages) + column]
            axes.plot(curve["step"], curve[figures], color=colour)
            axes.set_ylim(0, 1.15 * max(curve[figures]))
            axes.set_title(f"{name}: {label}")
            style_steps_axis(axes, max(curve["step"]), label=row == 1)
    return to_png(figure)


def format_results(data: dict[str, Any]) -> str:
    rows = []
    for name, stage in data["stages"].items():
        (early, late), (less, more) = stage["steps_per_second"], stage["memory_mib"]
        rows.append(
            [
                name,
                f"{stage['num_steps']:,}",
                f"{stage['seconds'] / 60:.1f}",
                f"{stage['num_validations']} × {stage['validation_seconds']:.1f}",
                f"{stage['validation_share_of_stage']:.1%}",
                f"{stage['validation_share_of_run']:.1%}",
                f"{stage['num_checkpoints']} × {stage['checkpoint_seconds']:.2f}",
                f"{stage['checkpoint_share_of_stage']:.2%}",
                f"{early:.1f} → {late:.1f}",
                f"{less:.0f} → {more:.0f}",
            ]
        )
    header = ["stage", "steps", "minutes", "validations, s", "of the stage", "of the run", "checkpoints, s"]
    header += ["of the stage", "steps/s", "MiB"]
    return "\n".join(
        [
            f"# Validations, checkpoints, speed and memory of a run: {data['run']}",
            "",
            *evidence.describe_checks(data["failures"]),
            "",
            f"{data['seconds'] / 60:.0f} minutes on {data['processor']}. Arrows: from the second tenth of a stage to"
            " the last one, speed before fake quantisation begins.",
            "",
            evidence.markdown_table(header, rows),
        ]
    )


def main() -> int:
    parser = common.build_plain_parser("Tell what a run spent on validations and checkpoints.")
    parser.add_argument("--run", type=Path, required=True, metavar="RUN_DIR")
    parser.add_argument("--image", type=Path, help="also draw speed and memory over the steps into this PNG")
    options = parser.parse_args()
    data = measure(options.run)
    if options.image is not None:
        atomic.write_bytes(options.image, plot(data["stages"]))
    for stage in data["stages"].values():
        del stage["curve"]
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
