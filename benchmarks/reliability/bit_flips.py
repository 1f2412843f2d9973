"""Is a damaged checkpoint ever believed? Flipped bits and truncations, spread over all files of real checkpoints.

A small real training leaves several checkpoints. Each trial damages one file of one of them: one bit flipped, or the
file cut short. Places are stratified, so that every file is damaged equally often and along its whole length. Then the
store is opened as a new process would open it. Checked are, each time:

- loading the damaged checkpoint is refused, and the refusal names the checkpoint and the file;
- `load_newest_valid` returns the newest of the others, with exactly the state that was saved, and reports the damage if
  the damaged one would have come first;
- `latest` then points to what was returned.

Counted beside it: how often the file's own parser, without the hashes, would have taken the damaged file for a whole
one (safetensors, `torch.load(weights_only=True)`, JSON).

    python -m benchmarks.reliability.bit_flips

It takes about a minute and begins anew each time. The program ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from benchmarks import common, evidence
from benchmarks.reliability.small_training import describe_state, train
from cvm_translator.checkpoints.folder import MANIFEST, load_checkpoint
from cvm_translator.checkpoints.store import LATEST, CheckpointStore
from cvm_translator.errors import CheckpointError

NAME = "bit_flips"
NUM_STEPS = 8
KEEP = 4
REFUSED = "every damaged checkpoint is refused, and the refusal names the file"
NEWEST = "the newest valid checkpoint is used in its place, with the state that was saved"
REPORTED = "a damaged checkpoint that would have come first is reported by name"

Damage = Callable[[random.Random, bytes, float], bytes]


def flip_bit(generator: random.Random, whole: bytes, place: float) -> bytes:
    """One bit flipped, `place` (0 to 1) along the file."""
    index = min(len(whole) - 1, int(place * len(whole)))
    return whole[:index] + bytes([whole[index] ^ (1 << generator.randrange(8))]) + whole[index + 1 :]


def truncate(generator: random.Random, whole: bytes, place: float) -> bytes:
    """Cut short: now and then of everything or of one byte only, else `place` along the file."""
    return whole[: generator.choice([0, len(whole) - 1] if generator.random() < 0.1 else [int(place * len(whole))])]


DAMAGES: dict[str, Damage] = {"bit flip": flip_bit, "truncation": truncate}


def draw_damages(
    damage: Damage, files: list[Path], num_trials: int, generator: random.Random
) -> Iterator[tuple[Path, bytes, bytes]]:
    """File, its whole content and its damaged one; each file in turn, along its length."""
    per_file = -(-num_trials // len(files))
    for trial in range(num_trials):
        file = files[trial % len(files)]
        whole = file.read_bytes()
        damaged = whole
        while damaged == whole:
            place = (trial // len(files) + generator.random()) / per_file
            damaged = damage(generator, whole, place)
        yield file, whole, damaged


def is_parsed(file: Path) -> bool:
    """Whether the file's own parser finds nothing wrong; what it only warns of is not counted as that."""
    try:
        with warnings.catch_warnings(action="ignore"):
            _parse(file)
    except Exception:
        return False
    return True


def _parse(file: Path) -> None:
    if file.suffix == ".safetensors":
        safetensors.torch.load_file(file)
    elif file.suffix == ".pt":
        torch.load(file, map_location="cpu", weights_only=True)
    else:
        json.loads(file.read_bytes())


class Trials:
    """Damages the checkpoints of one store again and again, and mends them again."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.names = CheckpointStore(directory, report=print).names()
        self.states = {name: describe_state(load_checkpoint(directory / name)) for name in self.names}
        self.files = sorted(path for name in self.names for path in (directory / name).iterdir())
        self.failures: dict[str, list[str]] = {REFUSED: [], NEWEST: [], REPORTED: []}
        self.counts: dict[str, Counter[str]] = {}

    def run(self, kind: str, num_trials: int, seed: int) -> None:
        """Damage `num_trials` files in one way, one at a time."""
        counts = self.counts.setdefault(kind, Counter())
        generator = random.Random(seed)
        for trial, (file, whole, damaged) in enumerate(
            draw_damages(DAMAGES[kind], self.files, num_trials, generator), start=1
        ):
            file.write_bytes(damaged)
            what = f"{kind} {trial} ({file.parent.name}/{file.name})"
            counts[f"{file.name} damaged"] += 1
            counts[f"{file.name} parsed"] += is_parsed(file)
            self._check_refusal(file, what)
            self._check_recovery(file, what)
            file.write_bytes(whole)
        CheckpointStore(self.directory, KEEP, report=print).load_newest_valid()

    def _check_refusal(self, file: Path, what: str) -> None:
        try:
            load_checkpoint(file.parent)
        except CheckpointError as error:
            if file.name in str(error) and file.parent.name in str(error):
                return
            what += f": {error}"
        self.failures[REFUSED].append(what)

    def _check_recovery(self, file: Path, what: str) -> None:
        lines: list[str] = []
        try:
            loaded = CheckpointStore(self.directory, KEEP, report=lines.append).load_newest_valid()
        except CheckpointError as error:
            self.failures[NEWEST].append(f"{what}: {error}")
            return
        expected = next(name for name in self.names if name != file.parent.name)
        latest = (self.directory / LATEST).resolve().name
        if loaded is None or (loaded.path.name, latest) != (expected, expected):
            self.failures[NEWEST].append(f"{what}: {loaded.path.name if loaded else None}, latest {latest}")
        elif describe_state(loaded) != self.states[expected]:
            self.failures[NEWEST].append(f"{what}: another state than was saved")
        is_first = file.parent.name == self.names[0]
        if is_first and not any(file.parent.name in line and file.name in line for line in lines):
            self.failures[REPORTED].append(what)


def run_benchmark(options: Namespace) -> dict[str, Any]:
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    train(work, NUM_STEPS, keep=KEEP)
    trials = Trials(work / "checkpoints")
    for number, kind in enumerate(DAMAGES):
        trials.run(kind, options.num_trials, options.seed + number)
    file_names = sorted({file.name for file in trials.files})
    return {
        "num_trials": options.num_trials,
        "seed": options.seed,
        "checkpoints": trials.names,
        "files": {name: (trials.directory / trials.names[0] / name).stat().st_size for name in file_names},
        "counts": {kind: dict(counts) for kind, counts in trials.counts.items()},
        "failures": trials.failures,
    }


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the counts as Markdown."""
    num_files = len(data["files"])
    lines = [
        "# Damaged checkpoints",
        "",
        f"{data['num_trials']:,} single-bit flips and {data['num_trials']:,} truncations, spread over the {num_files}"
        f" files of each of {len(data['checkpoints'])} real checkpoints:",
        "",
        *evidence.describe_checks(data["failures"]),
        "",
        "How many the file's own parser would have taken for whole, had no hash been compared:",
        "",
    ]
    rows: list[list[object]] = []
    for name, size in data["files"].items():
        row: list[object] = [name + (" (JSON only)" if name == MANIFEST else ""), f"{size:,}"]
        for counts in data["counts"].values():
            num_damaged, num_parsed = counts[f"{name} damaged"], counts[f"{name} parsed"]
            row += [num_damaged, f"{num_parsed} ({num_parsed / num_damaged:.0%})"]
        rows.append(row)
    header = ["file", "bytes", "bit flips", "parsed", "truncations", "parsed"]
    return "\n".join([*lines, evidence.markdown_table(header, rows)])


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Damage checkpoints in every place and see that none is believed.")
    parser.add_argument("--num-trials", type=int, default=1000, metavar="N", help="of each kind of damage")
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME)
    return parser


def main() -> int:
    options = build_parser().parse_args()
    data = run_benchmark(options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
