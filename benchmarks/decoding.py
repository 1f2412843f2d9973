"""How fast is a run's student in each runtime, what does it lose there, and how far is its teacher behind?

Every system is the same student: Hugging Face `generate` (float32), the native runtime (float32, bfloat16 and int8),
CTranslate2 (float32, int8, int8 with the vocabulary map) and ONNX Runtime (float32, int8); and the teacher through
`generate`. Each runs in processes of its own that stay loaded, translates the same test sentences greedily, and is
timed from ids to ids, so tokenizers do not count.
Rounds are interleaved, so that a busy machine is busy for all, and medians of tokens a second are compared. All cores
are given to each system, as threads within a batch or as batches side by side, whichever a first round finds faster;
CTranslate2 is told to use AVX-512 where the processor has it, which it does not do by itself on all processors.

    python -m benchmarks.decoding --run distillation_output

The exports are made once in --work and used again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
from cvm_translator.config import load_config
from cvm_translator.corpus.build import load_split
from cvm_translator.corpus.records import Pair
from cvm_translator.metrics import MetricOptions, build_metrics
from cvm_translator.metrics.resampling import paired_bootstrap, resampling_counts
from cvm_translator.models.description import load_model_config
from cvm_translator.pipeline.export import ExportRequest, export_model
from cvm_translator.runs import atomic
from cvm_translator.runs.layout import RunLayout

NAME = "decoding"
NUM_SENTENCES = {1: 200, 32: 1000, 128: 2000}
"""Timed sentences by batch size."""
MAX_MAP_LOSS, MAX_BFLOAT16_LOSS = 0.2, 0.1


@dataclass(frozen=True)
class System:
    """A runtime with one of its formats; `native` ones read the run's own folders."""

    name: str
    runtime: str
    quantization: str
    vocabulary_map: bool | None = None
    precision: str = "float32"
    is_teacher: bool = False


SYSTEMS = (
    System("teacher, Transformers generate, float32", "huggingface", "float32", is_teacher=True),
    System("Transformers generate, float32", "huggingface", "float32"),
    System("native, float32", "native", "float32"),
    System("native, bfloat16", "native", "float32", precision="bfloat16"),
    System("native, int8", "native", "int8"),
    System("CTranslate2, float32", "ctranslate2", "float32", False),
    System("CTranslate2, int8", "ctranslate2", "int8", False),
    System("CTranslate2, int8, vocabulary map", "ctranslate2", "int8", True),
    System("ONNX Runtime, float32", "onnx", "float32"),
    System("ONNX Runtime, int8", "onnx", "int8"),
)
TEACHER, BASELINE, FLOAT32, BFLOAT16 = (system.name for system in SYSTEMS[:4])
INT8, MAPPED = SYSTEMS[6].name, SYSTEMS[7].name
DEMANDS = (
    (INT8, BASELINE, 3.0),
    (MAPPED, INT8, 1.2),
    (FLOAT32, BASELINE, 1.5),
    (BFLOAT16, BASELINE, 3.0),
    (MAPPED, TEACHER, 8.0),
)
"""One system decodes at least so many times the tokens a second of another, in batches of every size."""


# ---------------------------------------------------------------------------------------------------------- the workers


class Worker:
    """A process that has one system loaded and translates on request."""

    def __init__(self, system: System, folder: Path, num_threads: int, num_workers: int) -> None:
        self.setting = describe_setting(num_threads, num_workers)
        command = [
            sys.executable,
            "-m",
            "benchmarks.decoding",
            "--worker",
            system.runtime,
            str(folder),
            system.precision,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": str(num_threads), "PYTHONPATH": str(common.REPOSITORY)}
        if system.runtime == "ctranslate2" and _has_avx512():
            environment["CT2_FORCE_CPU_ISA"] = "AVX512"
        self._process = subprocess.Popen(
            [*command, str(num_threads), str(num_workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=common.REPOSITORY,
        )
        self._name = system.name

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise BenchmarkError(f"the worker of {self._name} ended with exit code {self._process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def run_worker(runtime: str, folder: str, precision: str, num_threads: int, num_workers: int) -> None:
    """The process of a Worker: JSON requests on standard input, one answer each."""
    from cvm_translator.models.runtimes import RuntimeSettings, load_runtime

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    settings = RuntimeSettings(num_threads=num_threads, num_workers=num_workers, precision=precision)
    loaded = load_runtime(runtime, folder, settings)
    for line in sys.stdin:
        request = json.loads(line)
        sources, batch_size = request["sources"], request["batch_size"]
        if request["texts"]:
            answer: Any = loaded.translate(sources, batch_size=batch_size)
        else:
            start = time.perf_counter()
            outputs = loaded.translate_ids(sources, batch_size=batch_size)
            seconds = time.perf_counter() - start
            answer = (sum(len(output) + 1 for output in outputs)) / seconds
        print(json.dumps(answer), file=answers, flush=True)


def _has_avx512() -> bool:
    path = Path("/proc/cpuinfo")
    return path.exists() and "avx512f" in path.read_text(encoding="utf-8")


def describe_setting(num_threads: int, num_workers: int) -> str:
    return f"{num_workers} × {num_threads} threads" if num_workers > 1 else f"{num_threads} threads"


def list_settings(system: System, num_cores: int) -> list[tuple[int, int]]:
    """(threads, workers) that may be the best use of the cores."""
    settings = [(num_cores, 1), (1, 1)]
    if system.runtime == "ctranslate2":
        settings.append((1, num_cores))
    return list(dict.fromkeys(settings))


# -------------------------------------------------------------------------------------------------------------- running


def find_folder(system: System, layout: RunLayout, work: Path) -> Path:
    """The system's files, exported if they are not there yet."""
    if system.runtime == "native":
        return layout.student / {"float32": "float", "int8": "int8"}[system.quantization]
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


def find_teacher(layout: RunLayout) -> Path:
    """The folder of a run's teacher, trained there or named in its config."""
    return load_config(layout.config).teacher.path or layout.teacher / "model"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    layout = RunLayout(options.run)
    if not (layout.student / "float" / "config.json").is_file():
        raise BenchmarkError(f"{options.run} is no finished run: it has no student/float; name one with --run")
    pairs = load_split(layout.corpus, "test")
    work = options.work / atomic.sha256_file(layout.student / "float" / "model.safetensors")[:16]
    folders = {system.name: find_folder(system, layout, work) for system in SYSTEMS}
    rates: dict[str, dict[str, Any]] = {system.name: {} for system in SYSTEMS}
    sources = _encode(layout, pairs)
    for batch_size in options.batch_sizes:
        chosen = sources[: int(NUM_SENTENCES.get(batch_size, len(sources)) * options.share) or 1]
        for name, found in measure_batch_size(folders, chosen, batch_size, options).items():
            rates[name][str(batch_size)] = found
    return {
        "run": str(options.run),
        "machine": _describe_machine(layout),
        "num_rounds": options.rounds,
        "share": options.share,
        "batch_sizes": options.batch_sizes,
        "num_test_sentences": len(pairs),
        "rates": rates,
        "sizes": {system.name: _count_weights(folders[system.name]) for system in SYSTEMS},
        "scores": score(folders, pairs, options),
    }


def measure_batch_size(
    folders: Mapping[str, Path], sources: Sequence[Sequence[int]], batch_size: int, options: argparse.Namespace
) -> dict[str, Any]:
    """Tokens a second of each system with its best setting: the median, and every round's."""
    workers: dict[str, Worker] = {}
    try:
        for system in SYSTEMS:
            trials = []
            for setting in list_settings(system, options.cores):
                worker = Worker(system, folders[system.name], *setting)
                trials.append((_time(worker, sources, batch_size, warm_up=True), worker))
            best = max(trials, key=lambda trial: trial[0])[1]
            for _, worker in trials:
                if worker is not best:
                    worker.close()
            workers[system.name] = best
        rounds: dict[str, list[float]] = {name: [] for name in workers}
        for number in range(options.rounds):
            print(f"batches of {batch_size}: round {number + 1} of {options.rounds}", flush=True)
            for name, worker in workers.items():
                rounds[name].append(_time(worker, sources, batch_size))
        return {
            name: {"median": statistics.median(found), "rounds": found, "setting": workers[name].setting}
            for name, found in rounds.items()
        }
    finally:
        for worker in workers.values():
            worker.close()


def _time(worker: Worker, sources: Sequence[Sequence[int]], batch_size: int, *, warm_up: bool = False) -> float:
    if warm_up:
        worker.ask(sources=sources[: max(1, len(sources) // 4)], batch_size=batch_size, texts=False)
    return float(worker.ask(sources=sources, batch_size=batch_size, texts=False))


def _encode(layout: RunLayout, pairs: Sequence[Pair]) -> list[list[int]]:
    """The test sources as ids, those of the model's length."""
    from cvm_translator.corpus.tokenizer import Tokenizer

    folder = layout.student / "float"
    longest = load_model_config(folder)["model"]["max_length"] - 1
    encoded = Tokenizer.load(folder / "sentencepiece.model").encode([pair.source for pair in pairs])
    return [ids for ids in encoded if 0 < len(ids) <= longest]


def _count_weights(folder: Path) -> int:
    weights = ("*.safetensors", "*.bin", "*.onnx*")
    return sum(path.stat().st_size for pattern in weights for path in folder.glob(pattern))


def score(folders: Mapping[str, Path], pairs: Sequence[Pair], options: argparse.Namespace) -> dict[str, Any]:
    """BLEU of each system on the test set, in batches of 32, and its difference to the native float32 student's."""
    (bleu,) = build_metrics(["bleu"], MetricOptions())
    references = [pair.target for pair in pairs]
    statistics_of: dict[str, Any] = {}
    for system in SYSTEMS:
        print(f"scoring {system.name}", flush=True)
        worker = Worker(system, folders[system.name], options.cores, 1)
        try:
            texts = worker.ask(sources=[pair.source for pair in pairs], batch_size=32, texts=True)
        finally:
            worker.close()
        statistics_of[system.name] = bleu.statistics(texts, references)
    counts = resampling_counts(len(pairs), evidence.NUM_DRAWS, evidence.DRAWS_SEED)

    def compare(name: str, other: str) -> dict[str, float]:
        item = paired_bootstrap(bleu, statistics_of[other], statistics_of[name], counts)
        low, high = item.interval
        return {"bleu": item.score_b, "difference": item.difference, "low": low, "high": high, "p_value": item.p_value}

    scores: dict[str, Any] = {system.name: compare(system.name, FLOAT32) for system in SYSTEMS}
    return scores | {"map against int8": compare(MAPPED, INT8)}


def _describe_machine(layout: RunLayout) -> dict[str, Any]:
    from importlib.metadata import version

    processor = "unknown"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    libraries = ("torch", "transformers", "ctranslate2", "onnxruntime")
    return {
        "processor": processor,
        "num_cores": os.cpu_count(),
        "load_at_start": os.getloadavg()[0],
        "libraries": {name: version(name) for name in libraries},
    }


# -------------------------------------------------------------------------------------------------------------- results


def compute_ratio(data: Mapping[str, Any], name: str, other: str, batch_size: int) -> float:
    """Tokens a second of one system over another's."""
    rates = data["rates"]
    return float(rates[name][str(batch_size)]["median"] / rates[other][str(batch_size)]["median"])


def find_failures(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each demand found wrong."""
    found: dict[str, list[str]] = {}
    for name, other, least in DEMANDS:
        ratios = {size: compute_ratio(data, name, other, size) for size in data["batch_sizes"]}
        said = [f"batch {size}: {ratio:.2f}" for size, ratio in ratios.items() if ratio < least]
        found[f"{name}: at least {least:g} times the tokens of {other}"] = said
    for name, compared, most in ((MAPPED, "map against int8", MAX_MAP_LOSS), (BFLOAT16, BFLOAT16, MAX_BFLOAT16_LOSS)):
        loss = -data["scores"][compared]["difference"]
        found[f"{name}: a loss of at most {most:g} BLEU"] = [f"{loss:.2f}"] if loss > most else []
    return found


def format_results(data: Mapping[str, Any]) -> str:
    machine, sizes = data["machine"], data["batch_sizes"]
    baseline = data["rates"][BASELINE]
    rows = []
    for system in SYSTEMS:
        rates, scored = data["rates"][system.name], data["scores"][system.name]
        cells = [
            f"{rates[str(size)]['median']:,.0f} ({rates[str(size)]['median'] / baseline[str(size)]['median']:.1f}×)"
            for size in sizes
        ]
        change = f"{scored['difference']:+.2f} [{scored['low']:+.2f}, {scored['high']:+.2f}]"
        megabytes = f"{data['sizes'][system.name] / 2**20:.1f}"
        rows.append([system.name, *cells, f"{scored['bleu']:.2f}", change, megabytes])
    header = ["runtime", *(f"batch {size}" for size in sizes), "BLEU", "against float32", "MiB"]
    settings = {
        f"batch {size}": ", ".join(
            f"{system.name}: {data['rates'][system.name][str(size)]['setting']}" for system in SYSTEMS
        )
        for size in sizes
    }
    libraries = ", ".join(f"{name} {version}" for name, version in machine["libraries"].items())
    gain = data["scores"]["map against int8"]
    return "\n".join(
        [
            f"# Speed of the student in each runtime: {data['run']}",
            "",
            f"Tokens a second, greedy, medians of {data['num_rounds']} interleaved rounds on {machine['num_cores']} "
            f"cores ({machine['processor']}, load {machine['load_at_start']:.1f} at the start); how many "
            f"times Transformers' speed in brackets. BLEU on {data['num_test_sentences']} test sentences, with "
            f"the difference to the native float32 student and its 95 % interval. {libraries}.",
            "",
            evidence.markdown_table(header, rows),
            "",
            "The vocabulary map against CTranslate2 int8 without it: "
            + ", ".join(f"{compute_ratio(data, MAPPED, INT8, size):.2f}× at batch {size}" for size in sizes)
            + f"; BLEU {evidence.describe_comparison(gain)}.",
            "",
            *evidence.describe_checks(find_failures(data)),
            "",
            *(f"- best settings, {name}: {text}" for name, text in settings.items()),
        ]
    )


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        runtime, folder, precision, num_threads, num_workers = sys.argv[2:]
        run_worker(runtime, folder, precision, int(num_threads), int(num_workers))
        return 0
    parser = common.build_plain_parser("Time a run's student in each runtime.")
    parser.add_argument("--run", type=Path, default=Path("distillation_output"), metavar="RUN_DIR")
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME, help="folder of the exports")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(NUM_SENTENCES), metavar="B")
    parser.add_argument("--share", type=float, default=1.0, help="of the timed sentences, for a quick look")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, metavar="N")
    options = parser.parse_args()
    data = measure(options)
    data["failures"] = find_failures(data)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
