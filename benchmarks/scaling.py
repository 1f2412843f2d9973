"""What grows with the corpus? Build, start, step and memory at 10,000 to 10,000,000 sentence pairs.

Each size is a TSV file of sentences made of the words of a real run, put through the product's own commands: `corpus
build`, a run that is new to the corpus (it writes the token ids and trains a tiny teacher and student), and a run that
finds corpus, tokenizer, token ids and teacher. Told are the build's time and memory, the time from the second run's
command to its first distillation step, its time a step with what handing out batches takes of it, and its memory.

    python -m benchmarks.scaling --run my_run --work /big/disk/scaling --sizes 10000 1000000

Sizes that are measured already in --work are not measured again; after a change of the code, give another.
10,000,000 pairs need about 10 GB of disk.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks import common, evidence
from benchmarks.common import PROGRAM, Arm, BenchmarkError
from benchmarks.machine import describe_machine, read_machine
from cvm_translator.corpus.batches import BatchSchedule
from cvm_translator.corpus.build import load_split
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.corpus.tokenizer import MODEL_NAME, Tokenizer
from cvm_translator.corpus.tokens import obtain_tokens
from cvm_translator.errors import EXIT_GATE_FAILED, EXIT_OK
from cvm_translator.observe.plot_style import STUDENT, build_figure, styled, to_png
from cvm_translator.runs import atomic
from cvm_translator.runs.events import read_events
from cvm_translator.runs.layout import RunLayout

NAME = "scaling"
SIZES = (10_000, 100_000, 1_000_000, 10_000_000)
MAX_START_SECONDS = 30.0
MAX_STEP_GROWTH = 1.1
NUM_STEPS = 600
BATCH_SIZE = 32
LONGEST_WORDS = 24
LINES_A_WRITE = 100_000
TINY = {"dim": 64, "num_heads": 2, "feed_forward_dim": 128, "encoder_layers": 1, "decoder_layers": 1}


# --------------------------------------------------------------------------------------------------------------- corpus


def write_corpus(split: Path, path: Path, num_pairs: int) -> None:
    """A TSV file of pairs; target words follow the source's one by one, so that no check finds them unrelated."""
    counts = Counter(
        word
        for line in split.read_text(encoding="utf-8").splitlines()
        for side in line.split("\t")[:2]
        for word in side.split()
        if word.isalpha()
    )
    if len(counts) < 1000:
        raise BenchmarkError(f"{split} has {len(counts)} different words, 1,000 are needed: name a run with more text")
    vocabulary = np.array([word for word, _ in counts.most_common()])
    translation = np.roll(vocabulary, 1)  # a word and its translation are about as frequent
    # Drawn as often as in real text: of words that are all alike a tiny teacher learns to write nothing.
    share = np.array(sorted(counts.values(), reverse=True)) / counts.total()
    generator = np.random.default_rng(13)

    def fill(stream: Any) -> None:
        for begin in range(0, num_pairs, LINES_A_WRITE):
            lengths = generator.integers(4, LONGEST_WORDS, min(LINES_A_WRITE, num_pairs - begin))
            places = np.split(generator.choice(len(vocabulary), int(lengths.sum()), p=share), np.cumsum(lengths)[:-1])
            stream.write(
                "".join(f"{' '.join(vocabulary[p])}\t{' '.join(translation[p])}\n" for p in places).encode("utf-8")
            )

    atomic.write_stream(path, fill)


def write_config(path: Path, corpus: Path, tokenizer: Path) -> None:
    # Enough for a teacher that writes words: one that writes nothing has no quality to keep, and a run refuses it.
    training = {
        "num_iterations": 300,
        "batch_size": BATCH_SIZE,
        "learning_rate": 0.003,
        "warmup_steps": 10,
        "validate_every_steps": 300,
    }
    validation = {"every_steps": NUM_STEPS, "metrics": ["bleu", "chrf"], "weights": {"bleu": 1.0, "chrf": 1.0}}
    config = {
        "corpus": {
            "source_language": "de",
            "target_language": "en",
            "train": [{"format": "tsv", "path": str(corpus)}],
            "validation_size": 200,
            "test_size": 200,
            "cleaning": {"language_check": False},  # the sentences are made of words of both
        },
        "tokenizer": {"path": str(tokenizer)},
        "teacher": {
            "model": TINY,
            "training": training,
            "store_states": False,
            "cache_dir": str(path.parent / "teachers"),
        },
        "student": {"model": TINY},
        "distillation": {"num_iterations": NUM_STEPS, "batch_size": BATCH_SIZE, "warmup_steps": 10, "temperature": 1.0},
        "validation": validation,
    }
    atomic.write_text(path, yaml.safe_dump(config))


# -------------------------------------------------------------------------------------------------------------- measure


def measure(size: int, run: RunLayout, work: Path) -> dict[str, float]:
    """All figures of one size; what is large is removed afterwards."""
    folder = work / str(size)
    shutil.rmtree(folder, ignore_errors=True)
    corpus, config = folder / "corpus.tsv", folder / "config.yaml"
    write_corpus(run.corpus / "train.tsv", corpus, size)
    write_config(config, corpus, run.tokenizer / MODEL_NAME)
    first, second = (Arm(name, config, (), folder / name) for name in ("first", "second"))
    figures: dict[str, float] = {}
    build = [*PROGRAM, "corpus", "build", str(config), "--output-dir", str(first.folder)]
    figures["build_seconds"], figures["build_mib"] = _run(build)
    figures["first_run_seconds"], _ = _run([*first.command(), "--no-progress"])
    common.share_folders(first.folder, second.folder)
    start = time.time()
    _run([*second.command(), "--no-progress"])
    figures |= _read_run(second.layout, start) | _hand_out(first.layout)
    figures["disk_mib"] = sum(path.stat().st_size for path in (first.folder / "corpus").iterdir()) / 2**20
    shutil.rmtree(folder)
    return figures


def _run(command: list[str]) -> tuple[float, float]:
    """Seconds that a command takes, and MiB of its largest process; tiny models may fail the gate, nothing else."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, cwd=common.REPOSITORY)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - start
        errors.seek(0)
        if process.returncode not in (EXIT_OK, EXIT_GATE_FAILED):
            raise BenchmarkError(f"{' '.join(command)} failed: {(errors.read().strip().splitlines() or ['?'])[-1]}")
    return seconds, usage.ru_maxrss / 2**10


def _read_run(layout: RunLayout, start: float) -> dict[str, float]:
    """Of a run that began at `start`: seconds until the first distillation step is written, time a step, memory."""
    steps: list[dict[str, Any]] = []
    progress: list[dict[str, Any]] = []
    for event in read_events(layout.events):
        if event.get("stage") == "distil" and event["kind"] in ("train", "progress"):
            (steps if event["kind"] == "train" else progress).append(event)
    times = [datetime.fromisoformat(event["time"]).timestamp() for event in (steps[0], steps[-1])]
    return {
        "start_seconds": times[0] - start,
        "step_ms": 1000 * (times[1] - times[0]) / (len(steps) - 1),
        "trainer_mib": max(event["memory_mib"] for event in progress),
    }


def _hand_out(layout: RunLayout) -> dict[str, float]:
    """Time that choosing and padding a batch takes, and that an epoch's order takes, both without any training."""
    files = obtain_tokens(
        load_split(layout.corpus, "train"),
        Tokenizer.load(layout.tokenizer / MODEL_NAME),
        layout.tokenizer / "train_tokens",
    )
    dataset = DistillationDataset.from_files(files)
    start = time.perf_counter()
    batches = BatchSchedule(dataset.lengths, BATCH_SIZE, seed=5)
    epoch_seconds = time.perf_counter() - start
    num_batches = min(NUM_STEPS, batches.num_batches_per_epoch)
    start = time.perf_counter()
    for _ in range(num_batches):
        dataset.batch(batches.next())
    return {
        "batch_ms": 1000 * (time.perf_counter() - start) / num_batches,
        "epoch_seconds": epoch_seconds,
        "epoch_ms_a_step": 1000 * epoch_seconds / batches.num_batches_per_epoch,
    }


# -------------------------------------------------------------------------------------------------------------- program


def check(sizes: dict[int, dict[str, float]]) -> dict[str, list[str]]:
    smallest, largest = sizes[min(sizes)], sizes[max(sizes)]
    growth = largest["step_ms"] / smallest["step_ms"]
    return {
        f"a run starts within {MAX_START_SECONDS:g} s after the first build": [
            f"{size:,} pairs: {figures['start_seconds']:.0f} s"
            for size, figures in sizes.items()
            if figures["start_seconds"] > MAX_START_SECONDS
        ],
        f"a step takes at most {MAX_STEP_GROWTH:g} times the smallest corpus's": (
            [] if growth <= MAX_STEP_GROWTH else [f"{growth:.2f} times"]
        ),
    }


def format_results(data: dict[str, Any]) -> str:
    rows = [
        [
            f"{int(size):,}",
            f"{figures['build_seconds']:.0f}",
            f"{figures['build_seconds'] * 1e6 / int(size):.0f}",
            f"{figures['build_mib']:.0f}",
            f"{figures['start_seconds']:.1f}",
            f"{figures['step_ms']:.1f}",
            f"{figures['batch_ms']:.2f}",
            f"{figures['epoch_ms_a_step']:.2f}",
            f"{figures['trainer_mib']:.0f}",
        ]
        for size, figures in data["sizes"].items()
    ]
    header = ["pairs", "build s", "build s a million", "build MiB", "start s", "step ms", "of it batch ms"]
    header += ["epoch's order ms a step", "trainer MiB"]
    return "\n".join(
        [
            "# Growth with the corpus",
            "",
            *evidence.describe_checks(data["failures"]),
            "",
            "Build: `corpus build`, largest process. Start: from the command of a run that"
            " finds everything built to its first distillation step. Step: a tiny student and teacher, batches of"
            f" {BATCH_SIZE}, {NUM_STEPS} steps.",
            "",
            describe_machine(data["machine"]),
            "",
            evidence.markdown_table(header, rows),
        ]
    )


@styled
def plot(sizes: Mapping[str, Mapping[str, float]]) -> bytes:
    """Time a step and memory of the trainer by the size of the corpus."""
    figure, panels = build_figure(1, 2, 7.2, 3.2)
    pairs = [int(size) for size in sizes]
    for axes, name, label in zip(panels, ("step_ms", "trainer_mib"), ("ms a step", "MiB of the trainer"), strict=True):
        axes.plot(pairs, [figures[name] for figures in sizes.values()], marker="o", color=STUDENT)
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.set_xticks(pairs, [f"{size / 1e6:g} M" if size >= 1e6 else f"{size:,}" for size in pairs])
        axes.set_ylim(0, 1.15 * max(figures[name] for figures in sizes.values()))
        axes.set_xlabel("sentence pairs")
        axes.set_title(label)
    return to_png(figure)


def main() -> int:
    parser = common.build_plain_parser("Measure what grows with the corpus.")
    parser.add_argument("--run", type=Path, required=True, help="run folder that lends its words and tokenizer")
    parser.add_argument("--work", type=Path, default=Path("scaling"), help="folder on a disk with room")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N")
    parser.add_argument("--plot", type=Path, default=common.REPOSITORY / "docs" / "images" / "scaling.png")
    options = parser.parse_args()
    run = RunLayout(options.run.absolute())
    for needed in (run.corpus / "train.tsv", run.tokenizer / MODEL_NAME):
        if not needed.is_file():
            raise BenchmarkError(
                f"--run {options.run}: {needed} does not exist; name a run that got past its tokenizer"
            )
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / "measured.json"
    machine = read_machine()
    measured: dict[str, dict[str, float]] = atomic.read_json(path) if path.exists() else {}
    for size in sorted(options.sizes):
        if str(size) not in measured:
            measured[str(size)] = measure(size, run, options.work.absolute())
            atomic.write_json(path, measured)
            print(f"{size:,} pairs are done", flush=True)
    chosen = {size: measured[str(size)] for size in sorted(options.sizes)}
    data = {
        "machine": machine,
        "sizes": {str(size): figures for size, figures in chosen.items()},
        "failures": check(chosen),
    }
    atomic.write_bytes(options.plot, plot(data["sizes"]))
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
