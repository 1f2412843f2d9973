"""Translate test sets with a model folder in a process of its own, as it would be deployed.

`python -m cvm_translator.pipeline.measure --model DIR --output FILE --set NAME=PAIRS.tsv …` loads the folder from its
files (with `--runtime NAME` an exported one, in the library it is for), translates the sources of each set and writes
hypotheses, speed and peak memory as JSON. The process that trained the model shares nothing with it but the files, so
what is measured is what is delivered.

`peak_memory_mib` is the peak resident memory of the whole process, interpreter and libraries included;
`baseline_memory_mib` is what it held before the model was loaded. `tokens_per_second` counts generated tokens, end
marks included, over the first set, after a first batch that is not timed. With `--references` the cross-entropy of
every pair's reference is measured as well (`reference_losses`), where the runtime can tell it.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cvm_translator.corpus.records import Pair
from cvm_translator.errors import (
    EXIT_ERROR,
    EXIT_NO_ROOM,
    EXIT_OK,
    ModelError,
    NoRoomError,
    describe_error,
    is_full_disk,
)
from cvm_translator.runs import atomic
from cvm_translator.runs.text import printable

NUM_WARM_UP = 4
"""Sentences that are translated before the clock runs: kernels are chosen and weights packed at first use."""


def measure_folder(
    model: Path,
    sets: dict[str, Path],
    output: Path,
    *,
    beam_size: int,
    batch_size: int,
    device: str,
    num_threads: int,
    runtime: str = "native",
    with_references: bool = False,
) -> dict[str, Any]:
    """Run this module in a fresh process and return what it measured; raises ModelError or NoRoomError if it failed."""
    command = [sys.executable, "-m", "cvm_translator.pipeline.measure", "--model", str(model), "--output", str(output)]
    command += ["--beam-size", str(beam_size), "--batch-size", str(batch_size)]
    command += ["--device", device, "--num-threads", str(num_threads), "--runtime", runtime]
    command += ["--references"] if with_references else []
    for name, path in sets.items():
        command += ["--set", f"{name}={path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        kind = NoRoomError if done.returncode == EXIT_NO_ROOM else ModelError
        raise kind(f"{model} could not be measured in a fresh process: {last[0].removeprefix('error: ')}")
    result: dict[str, Any] = atomic.read_json(output)
    return result


def measure_sentences(
    model: Path,
    sources: Sequence[str],
    *,
    beam_size: int = 1,
    batch_size: int = 128,
    device: str = "cpu",
    num_threads: int = 1,
    runtime: str = "native",
) -> dict[str, Any]:
    """`measure_folder` on sentences that lie in no file; `hypotheses` is the list of their translations."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "sources.tsv"
        path.write_text("".join(f"{source}\t\n" for source in sources), encoding="utf-8")
        result = measure_folder(
            model,
            {"sentences": path},
            Path(scratch) / "measured.json",
            beam_size=beam_size,
            batch_size=batch_size,
            device=device,
            num_threads=num_threads,
            runtime=runtime,
        )
    return result | {"hypotheses": result["hypotheses"]["sentences"]}


def main(arguments: list[str] | None = None) -> int:
    """Entry of the fresh process."""
    parser = argparse.ArgumentParser(prog="cvm_translator.pipeline.measure", description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--set", dest="sets", action="append", required=True, metavar="NAME=PAIRS.tsv")
    parser.add_argument("--beam-size", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--runtime", default="native")
    parser.add_argument("--references", action="store_true")
    options = parser.parse_args(arguments)
    try:
        sets = dict(item.split("=", 1) for item in options.sets)
        atomic.write_json(options.output, _measure(options, {name: Path(path) for name, path in sets.items()}))
    except (ValueError, OSError) as error:
        print(printable(f"error: {describe_error(error)}"), file=sys.stderr)
        return EXIT_NO_ROOM if is_full_disk(error) else EXIT_ERROR
    return EXIT_OK


def _measure(options: argparse.Namespace, sets: dict[str, Path]) -> dict[str, Any]:
    from cvm_translator.models.runtimes import RuntimeSettings, import_runtime

    runtime = import_runtime(options.runtime)
    baseline = _peak_memory_mib()
    loaded = runtime(options.model, RuntimeSettings(options.device, options.num_threads))
    hypotheses: dict[str, list[str]] = {}
    losses: dict[str, Any] = {}
    tokens_per_second = 0.0
    pairs = {name: _read_pairs(path) for name, path in sets.items()}
    for index, name in enumerate(sets):
        sources = [pair.source for pair in pairs[name]]
        if index == 0:
            loaded.translate(sources[:NUM_WARM_UP], beam_size=options.beam_size, batch_size=options.batch_size)
        start = time.perf_counter()
        hypotheses[name] = loaded.translate(sources, beam_size=options.beam_size, batch_size=options.batch_size)
        seconds = time.perf_counter() - start
        if index == 0:
            num_tokens = sum(len(ids) + 1 for ids in loaded.tokenizer.encode(hypotheses[name]))
            tokens_per_second = num_tokens / seconds
    peak = _peak_memory_mib()
    if options.references:
        losses = {name: loaded.measure_references(pairs[name], options.batch_size) for name in sets}
    return {
        "model": str(options.model),
        "number_format": loaded.facts["number_format"],
        "num_parameters": loaded.facts["num_parameters"],
        "num_bytes": loaded.num_bytes,
        "hypotheses": hypotheses,
        "tokens_per_second": tokens_per_second,
        "reference_losses": losses,
        "peak_memory_mib": peak,
        "baseline_memory_mib": baseline,
        "batch_size": options.batch_size,
        "beam_size": options.beam_size,
        "num_threads": options.num_threads,
    }


def _read_pairs(path: Path) -> list[Pair]:
    """The pairs of a split's file or of `measure_sentences`, whose targets are empty."""
    rows = (line.split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line)
    return [Pair(row[0], row[1] if len(row) > 1 else "", "") for row in rows]


def _peak_memory_mib() -> float:
    # Linux keeps ru_maxrss across fork and exec, so a child would show its parent's peak; VmHWM begins anew.
    if Path("/proc/self/status").exists():
        status = Path("/proc/self/status").read_text()
        return float(status.split("VmHWM:", 1)[1].split()[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20  # macOS counts bytes


if __name__ == "__main__":
    sys.exit(main())
