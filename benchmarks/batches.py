"""How much of what batches hold is text, and how much is padding?

The training pairs of a run in three arrangements of batches with as many tokens on average: sentences as they come in a
shuffled epoch, batches of a number of sentences (`batch_size`, of pools that are sorted by length), and batches of a
budget of tokens (`batch_tokens`), each over a whole epoch. Efficiency is real tokens over padded positions, end marks
included, source and target together.

    python -m benchmarks.batches --run RUN_DIR
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
from benchmarks.training_problem import find_budget
from cvm_translator.config import load_config
from cvm_translator.corpus.batches import BatchSchedule
from cvm_translator.corpus.build import load_split
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.corpus.tokenizer import MODEL_NAME, Tokenizer
from cvm_translator.corpus.tokens import obtain_tokens
from cvm_translator.observe.plot_style import BAD, STUDENT, TASK, add_legend, build_figure, build_handle, styled, to_png
from cvm_translator.runs import atomic
from cvm_translator.runs.layout import RunLayout

NAME = "batches"
SIZES = (16, 32, 64, 128)
"""Sentences of a batch."""
MIN_EFFICIENCY = 0.95
SHUFFLED, COUNTED, BUDGETED = "shuffled", "by sentences", "by tokens"
COLOURS = {SHUFFLED: BAD, COUNTED: TASK, BUDGETED: STUDENT}
SEED = 13


def load_lengths(run: Path) -> NDArray[np.int32]:
    """Of the pairs that a run trains on, (N, 2): tokens of source and target without marks."""
    layout = RunLayout(run)
    model = layout.tokenizer / MODEL_NAME
    if not ((layout.corpus / "manifest.json").is_file() and model.is_file()):
        raise BenchmarkError(f"--run {run} has no corpus and tokenizer: name a run that got past its tokenizer")
    files = obtain_tokens(load_split(layout.corpus, "train"), Tokenizer.load(model), layout.tokenizer / "train_tokens")
    config = load_config(layout.config)
    max_length = min(config.teacher.model.max_length, config.student.model.max_length)
    return DistillationDataset.from_files(files, max_length).lengths


def measure(lengths: NDArray[np.integer[Any]], sizes: Sequence[int] = SIZES) -> dict[str, dict[str, float]]:
    """Efficiency of each arrangement by sentences a batch, and the budget of tokens that is as large on average."""
    found: dict[str, dict[str, float]] = {}
    for size in sizes:
        budget = find_budget(lengths, size)
        found[str(size)] = {
            "batch_tokens": budget,
            SHUFFLED: measure_shuffled(lengths, size),
            COUNTED: BatchSchedule(lengths, size, SEED).padding_efficiency(),
            BUDGETED: BatchSchedule(lengths, size, SEED, batch_tokens=budget).padding_efficiency(),
        }
    return found


def measure_shuffled(lengths: NDArray[np.integer[Any]], size: int) -> float:
    """Of batches in random order, as a plain data loader makes them."""
    order = np.random.default_rng(SEED).permutation(len(lengths))[: len(lengths) // size * size]
    batches = (lengths[order] + 1).reshape(-1, size, 2)
    return float(batches.sum() / (batches.max(axis=1).sum() * size))


def check(sizes: dict[str, dict[str, float]]) -> dict[str, list[str]]:
    return {
        f"at least {MIN_EFFICIENCY:.0%} of what a budget of tokens holds is text": [
            f"{figures['batch_tokens']:,} tokens: {figures[BUDGETED]:.1%}"
            for figures in sizes.values()
            if figures[BUDGETED] < MIN_EFFICIENCY
        ]
    }


@styled
def plot(sizes: dict[str, dict[str, float]]) -> bytes:
    """Efficiency over the size of a batch."""
    figure, (axes,) = build_figure(1, 1, 6.4, 3.2)
    for name, colour in COLOURS.items():
        axes.plot(list(sizes), [100 * figures[name] for figures in sizes.values()], marker="o", color=colour)
    axes.axhline(100 * MIN_EFFICIENCY, color=STUDENT, linestyle=":")
    axes.set_ylim(0, 105)
    axes.set_xlabel("sentences of a batch, on average")
    axes.set_ylabel("text, %")
    axes.set_title("How much of a batch is text")
    handles = [build_handle(colour, marker="o") for colour in COLOURS.values()]
    handles.append(build_handle(STUDENT, linestyle=":"))
    add_legend(figure, handles, [*COLOURS, f"{MIN_EFFICIENCY:.0%}"])
    return to_png(figure)


def format_results(data: dict[str, Any]) -> str:
    rows = [
        [size, f"{figures['batch_tokens']:,}", *(f"{figures[name]:.1%}" for name in COLOURS)]
        for size, figures in data["sizes"].items()
    ]
    return "\n".join(
        [
            "# Text and padding",
            "",
            *evidence.describe_checks(data["failures"]),
            "",
            f"The {data['num_pairs']:,} training pairs of {data['run']}, {data['mean_tokens']:.1f} tokens a side on"
            " average, a whole epoch of each arrangement. Shuffled: as a plain data loader makes batches.",
            "",
            evidence.markdown_table(["sentences", "tokens a side", *COLOURS], rows),
        ]
    )


def main() -> int:
    parser = common.build_plain_parser("Tell how much of a batch is text.")
    parser.add_argument("--run", type=Path, required=True, metavar="RUN_DIR")
    parser.add_argument("--plot", type=Path, default=common.REPOSITORY / "docs" / "images" / "batches.png")
    options = parser.parse_args()
    lengths = load_lengths(options.run)
    sizes = measure(lengths)
    data = {
        "run": options.run.resolve().name,
        "num_pairs": len(lengths),
        "mean_tokens": float((lengths + 1).mean()),
        "sizes": sizes,
        "failures": check(sizes),
    }
    atomic.write_bytes(options.plot, plot(sizes))
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
