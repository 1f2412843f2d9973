"""How fast is a run's student in each runtime, what does it lose there, and how far is its teacher behind?

Every system is the same student: Hugging Face `generate` (float32), the native runtime (float32, bfloat16, int8 and 4
bits), CTranslate2 (float32, int8, int8 with the vocabulary map) and ONNX Runtime (float32, int8); and the teacher
through `generate`. Each translates the same test sentences greedily in processes that stay loaded, and is timed from
ids to ids, so tokenizers do not count. Every system is offered the same arrangements of the same cores (see
`runtime_teams`) and takes what a first round at a batch size finds fastest; then rounds are interleaved, so that a busy
machine is busy for all, a round lasts two seconds at least, and medians of tokens a second are compared.

A vocabulary map's candidates are those of all sentences of a batch, so it gains and loses most in small batches: the
int8 export is scored with and without it at every batch size that is timed. What is demanded of the deployed model is
demanded at the batch size that `cvm-translator translate` gives it by default, and shown at the others.

    python -m benchmarks.decoding --run distillation_output

The exports are made once in --work and used again.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
from benchmarks.decoding_results import (
    DEPLOYED_BATCH_SIZE,
    FLOAT32,
    INT8,
    LOSSES,
    MAPPED,
    SYSTEMS,
    System,
    find_failures,
    format_results,
)
from benchmarks.runtime_teams import Arrangement, Sources, Team, find_ct2_isa, list_arrangements, read_processor
from cvm_translator.config import load_config
from cvm_translator.config.load import build_quantization
from cvm_translator.corpus.build import load_split
from cvm_translator.corpus.records import Pair
from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.metrics import MetricOptions, build_metrics
from cvm_translator.metrics.resampling import paired_bootstrap, resampling_counts
from cvm_translator.models.description import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, load_model_config
from cvm_translator.pipeline.export import ExportRequest, export_model
from cvm_translator.pipeline.export.sentences import spaced
from cvm_translator.pipeline.quantizing import QuantizeRequest, quantize_folder
from cvm_translator.runs import atomic
from cvm_translator.runs.layout import RunLayout

NAME = "decoding"
NUM_SENTENCES = {1: 150, DEPLOYED_BATCH_SIZE: 512, 64: 640, 128: 1024}
"""Timed sentences by batch size, more where there are many cores."""
BATCHES_A_CORE = 4
MIN_SECONDS = 2.0
"""Of a round's measurement: a fast system goes through the sentences several times."""


# -------------------------------------------------------------------------------------------------------------- running


def find_folder(system: System, layout: RunLayout, work: Path) -> Path:
    """The system's files, made if they are not there yet."""
    if system.runtime == "native":
        folder = layout.student / {"float32": "float"}.get(system.quantization, system.quantization)
        return folder if (folder / CONFIG_FILE).is_file() else _quantize(layout, work / f"native_{system.quantization}")
    suffix = "_map" if system.vocabulary_map else "_teacher" if system.is_teacher else ""
    folder = work / f"{system.runtime}_{system.quantization}{suffix}"
    if not folder.exists():
        print(f"exporting {folder}", flush=True)
        model = find_teacher(layout) if system.is_teacher else layout.student
        request = ExportRequest(
            model, system.runtime, folder, system.quantization, vocabulary_map=system.vocabulary_map
        )
        export_model(request, lambda line: None)
    return folder


def _quantize(layout: RunLayout, folder: Path) -> Path:
    """The 4-bit student of a run that trained for 8."""
    if not folder.exists():
        settings = build_quantization({"method": "weight_only", "bits": 4})
        quantize_folder(QuantizeRequest(layout.student / "float", folder, settings), lambda line: None, judge=False)
    return folder


def find_teacher(layout: RunLayout) -> Path:
    """The folder of a run's teacher, trained there or named in its config."""
    folder = load_config(layout.config).teacher.path or layout.teacher / "model"
    if not (folder / CONFIG_FILE).is_file():
        raise BenchmarkError(f"--run {layout.root}: its teacher {folder} is no model folder; put it back there")
    return folder


def measure(options: argparse.Namespace) -> dict[str, Any]:
    layout = common.find_student(options.run)
    find_teacher(layout)
    cores = choose_cores(options.cores)
    machine = describe_machine(cores)  # before anything is done that takes its time
    pairs = load_split(layout.corpus, "test")
    scored = spaced(pairs, options.num_scored)
    sources = _encode(layout, pairs)
    work = options.work / atomic.sha256_file(layout.student / "float" / WEIGHTS_FILE)[:16]
    folders = {system.name: find_folder(system, layout, work) for system in SYSTEMS}
    sizes = sorted({*options.batch_sizes, DEPLOYED_BATCH_SIZE})
    timed = {size: spaced(sources, count_sentences(size, len(cores), options.share)) for size in sizes}
    rates: dict[str, dict[str, Any]] = {system.name: {} for system in SYSTEMS}
    with contextlib.ExitStack() as stack:
        teams: dict[str, Team] = {}
        for system in SYSTEMS:
            team = Team(system.name, system.runtime, folders[system.name], system.precision, cores)
            teams[system.name] = stack.enter_context(team)
        for size, chosen in timed.items():
            for name, found in measure_batch_size(teams, chosen, size, len(cores), options.rounds).items():
                rates[name][str(size)] = found
        scores = score(teams, scored, sizes, len(cores), load_model_config(layout.student / "float")["target_language"])
    return {
        "run": options.run.resolve().name,
        "num_parameters": _count_weights(layout.student / "float") / 4,
        "machine": machine,
        "num_rounds": options.rounds,
        "batch_sizes": sizes,
        "num_timed": {str(size): len(chosen) for size, chosen in timed.items()},
        "num_scored": len(scored),
        "rates": rates,
        "sizes": {system.name: _count_weights(folders[system.name]) for system in SYSTEMS},
        **scores,
    }


def choose_cores(num_cores: int) -> list[int]:
    """The first of the cores that this process may use."""
    usable = sorted(os.sched_getaffinity(0))
    if not 0 < num_cores <= len(usable):
        raise BenchmarkError(f"--cores {num_cores}: this process may use {len(usable)}; name a number from 1 to that")
    return usable[:num_cores]


def describe_machine(cores: Sequence[int]) -> dict[str, Any]:
    libraries = ("torch", "transformers", "ctranslate2", "onnxruntime")
    return {
        "processor": read_processor("model name") or "unknown",
        "cores": list(cores),
        "load_at_start": os.getloadavg()[0],
        "ct2_isa": find_ct2_isa(),
        "libraries": {name: version(name) for name in libraries},
    }


def count_sentences(batch_size: int, num_cores: int, share: float) -> int:
    """How many sentences are timed: enough batches to keep every core busy."""
    least = NUM_SENTENCES.get(batch_size, max(NUM_SENTENCES.values()))
    return max(1, int(share * max(least, BATCHES_A_CORE * batch_size * num_cores)))


def measure_batch_size(
    teams: Mapping[str, Team], sources: Sources, batch_size: int, num_cores: int, num_rounds: int
) -> dict[str, Any]:
    """Tokens a second of each system in its best arrangement: the median, every round's, and the trials'."""
    found: dict[str, dict[str, Any]] = {}
    for name, team in teams.items():
        print(f"batches of {batch_size}: arrangements of {name}", flush=True)
        trials: dict[Arrangement, float] = {}
        for arrangement in list_arrangements(num_cores):
            team.arrange(arrangement)
            team.time(sources[::4], batch_size)
            trials[arrangement] = team.time(sources[::2], batch_size)
        best = max(trials, key=lambda arrangement: trials[arrangement])
        team.arrange(best)
        start = time.monotonic()
        team.time(sources[::4], batch_size)
        num_passes = math.ceil(MIN_SECONDS / (4 * (time.monotonic() - start)))
        found[name] = {
            "arrangement": str(best),
            "trials": {str(key): rate for key, rate in trials.items()},
            "passes": num_passes,
        }
    rounds: dict[str, list[float]] = {name: [] for name in teams}
    for number in range(num_rounds):
        print(f"batches of {batch_size}: round {number + 1} of {num_rounds}", flush=True)
        for name, team in teams.items():
            passes = [team.time(sources, batch_size) for _ in range(found[name]["passes"])]
            rounds[name].append(statistics.harmonic_mean(passes))  # the tokens of all over their time
    return {name: found[name] | {"rounds": rates, "median": statistics.median(rates)} for name, rates in rounds.items()}


def _encode(layout: RunLayout, pairs: Sequence[Pair]) -> list[list[int]]:
    """The test sources as ids, those of the model's length."""
    folder = layout.student / "float"
    longest = load_model_config(folder)["model"]["max_length"] - 1
    encoded = Tokenizer.load(folder / TOKENIZER_FILE).encode([pair.source for pair in pairs])
    return [ids for ids in encoded if 0 < len(ids) <= longest]


def _count_weights(folder: Path) -> int:
    weights = ("*.safetensors", "*.bin", "*.onnx*")
    return sum(path.stat().st_size for pattern in weights for path in folder.glob(pattern))


def score(
    teams: Mapping[str, Team], pairs: Sequence[Pair], sizes: Sequence[int], num_cores: int, language: str
) -> dict[str, Any]:
    """BLEU on the test set and its differences, with intervals of a paired bootstrap.

    All in batches of DEPLOYED_BATCH_SIZE, where no batch changes what the others write; the int8 export, with the map
    and without, in batches of every size.
    """
    (bleu,) = build_metrics(["bleu"], MetricOptions(target_language=language))
    sources, references = [pair.source for pair in pairs], [pair.target for pair in pairs]
    statistics_of: dict[tuple[str, int], Any] = {}
    for name, team in teams.items():
        print(f"scoring {name}", flush=True)
        team.arrange(Arrangement(1, num_cores))
        for size in sizes if name in (INT8, MAPPED) else [DEPLOYED_BATCH_SIZE]:
            statistics_of[name, size] = bleu.statistics(team.translate(sources, size), references)
    counts = resampling_counts(len(pairs), evidence.NUM_DRAWS, evidence.DRAWS_SEED)

    def compare(name: str, other: str, size: int = DEPLOYED_BATCH_SIZE) -> dict[str, float]:
        item = paired_bootstrap(bleu, statistics_of[other, size], statistics_of[name, size], counts)
        low, high = item.interval
        return {"bleu": item.score_b, "difference": item.difference, "low": low, "high": high, "p_value": item.p_value}

    return {
        "scores": {name: compare(name, FLOAT32) for name in teams},
        "compared": {
            f"{demand.name} against {demand.other}": {
                str(size): compare(demand.name, demand.other, size)
                for size in sizes
                if (demand.name, size) in statistics_of and (demand.other, size) in statistics_of
            }
            for demand in LOSSES
        },
    }


def main() -> int:
    parser = common.build_plain_parser("Time a run's student in each runtime.")
    parser.add_argument("--run", type=Path, default=Path("distillation_output"), metavar="RUN_DIR")
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME, help="folder of the exports")
    parser.add_argument("--name", default=NAME, help="of the results: another student's shall not replace them")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(NUM_SENTENCES), metavar="B")
    parser.add_argument("--share", type=float, default=1.0, help="of the timed sentences, for a quick look")
    parser.add_argument("--num-scored", type=int, default=2000, metavar="N", help="test sentences of BLEU at most")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    options = parser.parse_args()
    data = measure(options)
    data["failures"] = find_failures(data)
    return evidence.conclude(options.results, options.name, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
