"""What each quantisation method costs and gives: bytes, BLEU and chrF against float, speed, memory.

Takes finished runs of one config (several seeds share the test set) and quantises their float students in every way
that needs no training; the students of runs that trained at 4 bits are given with --qat4, one for each --run and in the
same order. Every model is loaded from its files in a fresh process. Differences against the float student of the same
seed come with a 95 % interval of a paired bootstrap over test sentences, statistics summed over seeds.

    python -m benchmarks.quantization --run RUN_DIR [--run RUN_DIR …] [--qat4 RUN_DIR …]

Speeds are of the first run's students, medians of interleaved rounds, one thread unless --threads says otherwise. The
program can be killed and started again; what was measured is kept in --work. It also draws quality against bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
from cvm_translator.config import load_config
from cvm_translator.config.load import build_quantization
from cvm_translator.corpus.build import load_split
from cvm_translator.metrics import MetricOptions, build_metrics
from cvm_translator.metrics.resampling import paired_bootstrap, resampling_counts
from cvm_translator.observe.plot_style import FLOAT, STUDENT, styled, to_png
from cvm_translator.pipeline.measure import measure_folder
from cvm_translator.pipeline.quantizing import QuantizeRequest, quantize_folder
from cvm_translator.runs import atomic
from cvm_translator.runs.layout import RunLayout

NAME = "quantization"
BATCH_SIZES = (1, 32, 128)
NUM_TIMED = {1: 48, 32: 512, 128: 1024}
"""Sentences that are timed at each batch size."""
REFERENCE = "float32"
TICKS_MIB = [tick * 2.0**power for power in range(-4, 14) for tick in (1.0, 1.25, 1.5)]


@dataclass(frozen=True)
class Variant:
    """One row of the table: a name and the settings of `quantize`, or the folder of a run's own student."""

    name: str
    settings: Mapping[str, Any] | None = None
    folder: str | None = None


VARIANTS = (
    Variant(REFERENCE, folder="float"),
    Variant("weight-only 16", {"method": "weight_only", "bits": 16}),
    Variant("dynamic 8", {"method": "dynamic", "bits": 8}),
    Variant("static 8", {"method": "static", "bits": 8}),
    Variant("weight-only 8", {"method": "weight_only", "bits": 8}),
    *(
        Variant(f"weight-only 4, groups of {size}", {"method": "weight_only", "bits": 4, "group_size": size})
        for size in (32, 64, 128)
    ),
    Variant("weight-only 4, a whole row", {"method": "weight_only", "bits": 4, "group_size": "row"}),
    Variant("weight-only 4, groups of 64, zero points", {"method": "weight_only", "bits": 4, "symmetric": False}),
    Variant("mixed, 6 times smaller", {"method": "mixed", "target_compression_ratio": 6.0}),
)
UNIFORM = "weight-only 4, groups of 64"
EQUAL_BYTES = "mixed, the bytes of uniform 4"
QAT4 = "trained at 4 bits"


def build_folders(run: Path, qat4: Path | None, work: Path) -> dict[str, Path]:
    """The model folder of every row, made where it is not there yet."""
    student = RunLayout(run).student
    folders: dict[str, Path] = {}
    for variant in VARIANTS:
        if variant.folder is not None:
            folders[variant.name] = student / variant.folder
        else:
            folders[variant.name] = _quantize(student / "float", variant.name, dict(variant.settings or {}), work)
    target = _num_bytes(folders[UNIFORM]) / 1e6
    settings = {"method": "mixed", "target_megabytes": target}
    folders[EQUAL_BYTES] = _quantize(student / "float", EQUAL_BYTES, settings, work)
    if qat4 is not None:
        folders[QAT4] = RunLayout(qat4).student / "int4"
    for name, folder in folders.items():
        if not (folder / "model.safetensors").is_file():
            raise BenchmarkError(f"{folder} ({name}) is no model folder: name finished runs")
    return folders


def _quantize(model: Path, name: str, settings: dict[str, Any], work: Path) -> Path:
    output = work / name.replace(",", "").replace(" ", "_")
    if not output.exists():
        output.parent.mkdir(parents=True, exist_ok=True)
        # judged below with all others, on the test set
        quantize_folder(QuantizeRequest(model, output, build_quantization(settings)), print, judge=False)
    return output


def _num_bytes(folder: Path) -> int:
    return (folder / "model.safetensors").stat().st_size


# ------------------------------------------------------------------------------------------------------------ measures


def measure_quality(folders: Mapping[str, Path], run: Path, work: Path, num_threads: int) -> dict[str, dict[str, Any]]:
    """Test-set hypotheses, bytes and peak memory of every row."""
    measured = {}
    for name, folder in folders.items():
        output = work / "measured" / f"{name.replace(',', '').replace(' ', '_')}.json"
        key = atomic.sha256_file(folder / "model.safetensors")
        known = atomic.read_json(output) if output.exists() else {}
        if known.get("sha256") != key:
            print(f"{run.name}: {name}", flush=True)
            known = measure_folder(
                folder,
                {"test": RunLayout(run).corpus / "test.tsv"},
                output,
                beam_size=1,
                batch_size=128,
                device="cpu",
                num_threads=num_threads,
            )
            known["sha256"] = key
            atomic.write_json(output, known)
        measured[name] = known
    return measured


def measure_speed(
    folders: Mapping[str, Path], run: Path, work: Path, num_threads: int, num_rounds: int
) -> dict[str, dict[str, float]]:
    """Generated tokens a second by row and batch size: medians over rounds in which the rows take turns."""
    pairs = load_split(RunLayout(run).corpus, "test")
    output = work / "speed.json"
    rounds: list[dict[str, dict[str, float]]] = atomic.read_json(output) if output.exists() else []
    while len(rounds) < num_rounds:
        speeds: dict[str, dict[str, float]] = {}
        for name, folder in folders.items():
            for batch_size in BATCH_SIZES:
                subset = work / f"timed_{batch_size}.tsv"
                chosen = pairs[: NUM_TIMED[batch_size]]
                atomic.write_text(subset, "".join(f"{pair.source}\t{pair.target}\n" for pair in chosen))
                result = measure_folder(
                    folder,
                    {"timed": subset},
                    work / "timed.json",
                    beam_size=1,
                    batch_size=batch_size,
                    device="cpu",
                    num_threads=num_threads,
                )
                speeds.setdefault(name, {})[str(batch_size)] = result["tokens_per_second"]
        rounds.append(speeds)
        atomic.write_json(output, rounds)
        print(f"speed, round {len(rounds)} of {num_rounds}", flush=True)
    if not rounds:
        return {}
    return {
        name: {size: statistics.median(one[name][size] for one in rounds) for size in rounds[0][name]}
        for name in rounds[0]
        if name in folders
    }


def compare(runs: Sequence[Path], measured: Sequence[Mapping[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Scores of every row and its differences from float and, for mixed, from uniform 4-bit; pooled over runs."""
    config = load_config(RunLayout(runs[0]).config)
    pairs = load_split(RunLayout(runs[0]).corpus, "test")
    references, sources = [pair.target for pair in pairs], [pair.source for pair in pairs]
    counts = resampling_counts(len(pairs), evidence.NUM_DRAWS, evidence.DRAWS_SEED)
    metrics = build_metrics(evidence.COMPARED, MetricOptions(target_language=config.corpus.target_language))
    results: dict[str, dict[str, Any]] = {}
    names = [name for name in measured[0] if all(name in one for one in measured)]
    for metric in metrics:
        summed = {
            name: np.sum(
                [metric.statistics(one[name]["hypotheses"]["test"], references, sources) for one in measured], axis=0
            )
            for name in names
        }
        for name in names:
            entry = results.setdefault(name, {"scores": {}, "against_float": {}, "against_uniform": {}})
            entry["scores"][metric.name] = float(metric.score(summed[name].sum(axis=0)))
            for key, other in (("against_float", REFERENCE), ("against_uniform", UNIFORM)):
                compared = paired_bootstrap(metric, summed[other], summed[name], counts)
                entry[key] |= evidence.plain_comparisons({metric.name: compared})
    for name in names:
        first = measured[0][name]
        results[name] |= {
            "num_bytes": first["num_bytes"],
            "byte_share": first["num_bytes"] / measured[0][REFERENCE]["num_bytes"],
            "memory_mib": first["peak_memory_mib"] - first["baseline_memory_mib"],
        }
    return results


# ------------------------------------------------------------------------------------------------------------- results


def format_results(data: Mapping[str, Any]) -> str:
    """The table and what it says of 4 bits, as Markdown."""
    rows = []
    for name, row in data["rows"].items():
        speeds = data["speeds"].get(name, {})
        rows.append(
            [
                name,
                f"{row['num_bytes'] / 2**20:.2f}",
                f"{row['byte_share']:.3f}",
                f"{row['scores']['bleu']:.2f}",
                "-" if name == REFERENCE else evidence.describe_comparison(row["against_float"]["bleu"]),
                "-" if name == REFERENCE else evidence.describe_comparison(row["against_float"]["chrf"]),
                *(f"{speeds[str(size)]:,.0f}" if speeds else "-" for size in BATCH_SIZES),
                f"{row['memory_mib']:.0f}",
            ]
        )
    header = ["method", "MiB", "of float32", "BLEU", "BLEU against float", "chrF against float"]
    header += [f"tokens/s, batch {size}" for size in BATCH_SIZES] + ["memory, MiB"]
    lines = [
        f"# Quantisation: {data['config']}",
        "",
        f"{data['num_runs']} seeds, {data['num_sentences']:,} test sentences; differences with 95 % interval (paired"
        f" bootstrap, {evidence.NUM_DRAWS:,} draws). Weights without the tokenizer. Speed: generated tokens a second on"
        f" {data['num_threads']} thread(s) of {data['processor']}, medians of {data['num_rounds']} interleaved rounds"
        " (-: not timed). Memory:"
        " peak above the bare process, translating the test set in batches of 128.",
        "",
        evidence.markdown_table(header, rows),
    ]
    uniform = data["rows"].get(EQUAL_BYTES)
    if uniform:
        lines += ["", "Mixed minus uniform 4-bit at equal bytes, BLEU: "
                  + evidence.describe_comparison(uniform["against_uniform"]["bleu"])]  # fmt: skip
    return "\n".join(lines)


@styled
def plot_quality(rows: Mapping[str, Mapping[str, Any]]) -> bytes:
    """BLEU against bytes, every row a point."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.8))
    axes = figure.subplots()
    points = sorted((row["scores"]["bleu"], row["num_bytes"] / 2**20, name) for name, row in rows.items())
    lowest, highest = points[0][0], points[-1][0]
    line_height = max(highest - lowest, 0.1) / 22
    placed: list[tuple[float, float]] = []
    for bleu, size, name in points:
        axes.plot(size, bleu, "o", color=FLOAT if name == REFERENCE else STUDENT)
        # labels never lie on each other
        text_height = max([bleu, *(height + line_height for other, height in placed if size < 1.5 * other)])
        placed.append((size, text_height))
        axes.annotate(name, (size, text_height), xytext=(8, -3), textcoords="offset points", fontsize=8)
    axes.set_xscale("log", base=2)
    sizes = [size for _, size, _ in points]
    ticks = [tick for tick in TICKS_MIB if min(sizes) / 1.2 <= tick <= max(sizes) * 1.2]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(min(sizes) / 1.1, max(sizes) * 1.3)
    axes.set_ylim(lowest - 2 * line_height, highest + 4 * line_height)
    axes.set_xlabel("weights, MiB")
    axes.set_ylabel("BLEU on the test set")
    axes.set_title("Quality against bytes")
    return to_png(figure)


def main() -> int:
    parser = common.build_plain_parser("Measure every quantisation method on finished runs.")
    parser.add_argument("--run", type=Path, action="append", required=True, metavar="RUN_DIR", dest="runs")
    parser.add_argument("--qat4", type=Path, action="append", default=[], metavar="RUN_DIR", help="trained at 4 bits")
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME)
    parser.add_argument("--plot", type=Path, default=common.REPOSITORY / "docs" / "images" / "quantization.png")
    parser.add_argument("--threads", type=int, default=1, metavar="T")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of timing; 0: leave the speeds out")
    options = parser.parse_args()
    if options.qat4 and len(options.qat4) != len(options.runs):
        raise BenchmarkError("--qat4 is given once for each --run, in the same order, or not at all")
    qat4 = options.qat4 or [None] * len(options.runs)
    measured: list[dict[str, Any]] = []
    first: dict[str, Any] = {}
    for run, trained in zip(options.runs, qat4, strict=True):
        work = options.work.resolve() / run.resolve().name
        folders = build_folders(run.resolve(), trained, work)
        first = first or folders
        measured.append(measure_quality(folders, run, work, options.threads))
    rows = compare(options.runs, measured)
    work = options.work.resolve() / options.runs[0].resolve().name
    speeds = measure_speed(first, options.runs[0], work, options.threads, options.rounds)
    layout = RunLayout(options.runs[0])
    data = {
        "config": f"{', '.join(run.name for run in options.runs)}",
        "num_runs": len(options.runs),
        "num_sentences": len(load_split(layout.corpus, "test")),
        "num_threads": options.threads,
        "num_rounds": options.rounds,
        "processor": atomic.read_json(layout.environment)["processor"],
        "rows": rows,
        "speeds": speeds,
    }
    evidence.write_results(options.results, NAME, data, format_results(data))
    atomic.write_bytes(options.plot, plot_quality(rows))
    print((options.results / f"{NAME}.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    common.run_main(main)
