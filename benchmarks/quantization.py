"""What each quantisation method costs and gives: bytes, BLEU and chrF against float, speed, memory.

Takes finished runs of one config (several seeds share the test set) and quantises their float students in every way
that needs no training; the students of runs that trained at 4 bits are given with --qat4, one for each --run and in the
same order. Every model is loaded from its files in a fresh process. Differences come with a 95 % interval of a paired
bootstrap over test sentences, statistics summed over runs. The program leaves with 0 only if all that is demanded of 8
and 4 bits holds, which takes three runs and --qat4.

    python -m benchmarks.quantization --run RUN_DIR [RUN_DIR …] [--qat4 RUN_DIR [RUN_DIR …]]

Speeds are of the first run's students, medians of rounds in which they take turns, one thread unless --threads says
otherwise. The program can be killed and started again: what was made and measured is kept in --work under the hashes of
the models, the test set, the threads and the machine; after a change of the code, give another. It also draws quality
against bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common, evidence
from benchmarks.quantization_plot import plot_quality
from benchmarks.quantization_rows import (
    Student,
    build_folders,
    build_lineup,
    hash_test_set,
    hash_weights,
    name_file,
    open_students,
)
from benchmarks.quantization_table import (
    BATCH_SIZES,
    compare,
    find_failures,
    find_medians,
    format_results,
)
from cvm_translator.config import load_config
from cvm_translator.corpus.build import load_split
from cvm_translator.corpus.records import Pair
from cvm_translator.pipeline.measure import measure_folder
from cvm_translator.runs import atomic
from cvm_translator.training.device import describe_environment

NAME = "quantization"
NUM_TIMED = {1: 128, 32: 512, 128: 1024}
"""Sentences that are timed at each batch size: a round of 17 rows takes about 5 minutes on a core."""


def measure_quality(folders: Mapping[str, Path], student: Student, num_threads: int) -> dict[str, dict[str, Any]]:
    """Test-set hypotheses, bytes and peak memory of every row."""
    measured = {}
    for name, folder in folders.items():
        output = student.work / "measured" / f"{name_file(name)}.json"
        key = {
            "sha256": hash_weights(folder),
            "test_sha256": hash_test_set(student.run),
            "num_threads": num_threads,
        }
        known = atomic.read_json(output) if output.exists() else {}
        if any(known.get(part) != value for part, value in key.items()):
            print(f"{student.run.root.name}: {name}", flush=True)
            known = key | measure_folder(
                folder,
                {"test": student.run.corpus / "test.tsv"},
                output,
                beam_size=1,
                batch_size=128,
                device="cpu",
                num_threads=num_threads,
            )
            atomic.write_json(output, known)
        measured[name] = known
    return measured


# --------------------------------------------------------------------------------------------------------------- speed


def describe_machine() -> dict[str, Any]:
    """What speeds depend on beside the models."""
    environment = describe_environment(torch.device("cpu"))
    return {
        "processor": environment["processor"],
        "num_cores": environment["num_cores"],
        "torch": environment["packages"]["torch"],
    }


def find_rounds_file(
    folders: Mapping[str, Path], student: Student, num_threads: int, machine: Mapping[str, Any]
) -> Path:
    """Where the timed rounds are kept of exactly these models, sentences, threads and machine."""
    key = {
        "models": {name: hash_weights(folder) for name, folder in folders.items()},
        "test_sha256": hash_test_set(student.run),
        "num_sentences": {str(size): NUM_TIMED[size] for size in BATCH_SIZES},
        "num_threads": num_threads,
        "machine": dict(machine),
    }
    return student.work / f"speed_{atomic.sha256_json(key)[:16]}.json"


def measure_speed(
    folders: Mapping[str, Path], student: Student, num_threads: int, num_rounds: int, machine: Mapping[str, Any]
) -> list[dict[str, dict[str, float]]]:
    """Generated tokens a second by row and batch size, for each round; a round is kept when all rows are timed."""
    if num_rounds < 1:
        return []
    output = find_rounds_file(folders, student, num_threads, machine)
    rounds: list[dict[str, dict[str, float]]] = atomic.read_json(output) if output.exists() else []
    subsets = _write_timed(load_split(student.run.corpus, "test"), student.work)
    while len(rounds) < num_rounds:
        rounds.append({name: _time(folder, subsets, student.work, num_threads) for name, folder in folders.items()})
        atomic.write_json(output, rounds)
        print(f"speed, round {len(rounds)} of {num_rounds}", flush=True)
    return rounds[:num_rounds]


def _write_timed(pairs: Sequence[Pair], work: Path) -> dict[int, Path]:
    subsets = {size: work / f"timed_{size}.tsv" for size in BATCH_SIZES}
    for size, path in subsets.items():
        atomic.write_text(path, "".join(f"{pair.source}\t{pair.target}\n" for pair in pairs[: NUM_TIMED[size]]))
    return subsets


def _time(folder: Path, subsets: Mapping[int, Path], work: Path, num_threads: int) -> dict[str, float]:
    """Generated tokens a second of a model by batch size, a fresh process each."""
    speeds = {}
    for size, path in subsets.items():
        result = measure_folder(
            folder,
            {"timed": path},
            work / "timed.json",
            beam_size=1,
            batch_size=size,
            device="cpu",
            num_threads=num_threads,
        )
        speeds[str(size)] = float(result["tokens_per_second"])
    return speeds


# ------------------------------------------------------------------------------------------------------------- program


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures, as JSON-compatible data."""
    students = open_students(options.runs, options.qat4, options.work)
    first, machine = students[0], describe_machine()
    pairs = load_split(first.run.corpus, "test")
    lineup = build_lineup(students)
    folders = [build_folders(student, lineup) for student in students]
    measured = [
        measure_quality(models, student, options.threads) for models, student in zip(folders, students, strict=True)
    ]
    target_language = load_config(first.run.config).corpus.target_language
    rounds = measure_speed(folders[0], first, options.threads, options.rounds, machine)
    return {
        "runs": [student.run.root.name for student in students],
        "runs_at_4_bits": [student.qat4.root.name for student in students if student.qat4],
        "num_sentences": len(pairs),
        "num_threads": options.threads,
        "machine": machine,
        **compare(measured, pairs, target_language, lineup),
        "speed_rounds": rounds,
        "speeds": find_medians(rounds),
    }


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Measure every quantisation method on finished runs.")
    several: dict[str, Any] = {"type": Path, "nargs": "+", "action": "extend", "metavar": "RUN_DIR"}
    parser.add_argument("--run", required=True, dest="runs", help="finished runs of one config", **several)
    parser.add_argument("--qat4", default=[], help="for each of them, one trained at 4 bits", **several)
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME)
    parser.add_argument("--plot", type=Path, default=common.REPOSITORY / "docs" / "images" / "quantization.png")
    parser.add_argument("--threads", type=int, default=1, metavar="T")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of timing; 0: leave the speeds out")
    return parser


def main() -> int:
    options = build_parser().parse_args()
    data = measure(options)
    data["failures"] = find_failures(data)
    atomic.write_bytes(options.plot, plot_quality(data["rows"]))
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
