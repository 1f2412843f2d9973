"""Do Argos Translate and LibreTranslate take the package, and say what we say?

Their dependencies are heavy, so each gets an environment of its own (see `argos_programs`). The package is installed
from its file with no network needed, and translates test sentences of a run, evenly spaced. With one beam both programs
decode as we do, except that they

- cut lines into sentences, which we do only where a line is too long,
- write blanks for underscores,
- have another limit for translations that never end,
- let CTranslate2 compute in int8 whatever the package holds, unless told otherwise,
- and LibreTranslate gives translations the case and the last punctuation mark of their sources.

Like is compared with like: one beam in both programs with our greedy search, in the same number format, underscores as
blanks on all sides, our text finished as LibreTranslate does it. On the lines to which none of the first three points
applies, the float32 package must say what the native float32 student says, and the int8 package must be as good; on all
lines the int8 package must be as good in both programs. What the programs write with their own four beams is shown.

    python -m benchmarks.argos_export --run distillation_output [--no-libretranslate]
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import argos_programs, common, evidence
from benchmarks.argos_programs import GREEDY, LibreTranslate
from cvm_translator.corpus.build import load_split
from cvm_translator.metrics import Metric, MetricOptions, build_metrics
from cvm_translator.metrics.resampling import paired_bootstrap, resampling_counts
from cvm_translator.models.description import load_model_config
from cvm_translator.models.runtimes import RuntimeSettings, load_runtime
from cvm_translator.models.runtimes.base import limit_output
from cvm_translator.pipeline.export import ExportRequest, export_model
from cvm_translator.pipeline.export.sentences import spaced
from cvm_translator.runs.layout import RunLayout

NAME = "argos_export"
MIN_AGREEMENT, MAX_BLEU_LOSS, MIN_COMPARABLE = 0.98, 0.3, 100

NATIVE_FLOAT, NATIVE_INT8 = "native, float32, greedy", "native, int8, greedy"
ARGOS_FLOAT, ARGOS_INT8 = "Argos Translate, float32, greedy", "Argos Translate, int8, greedy"
ARGOS_BEAMS = "Argos Translate, int8, four beams"
NATIVE_FINISHED = "native, int8, greedy, finished as by LibreTranslate"
LIBRETRANSLATE, LIBRETRANSLATE_BEAMS = "LibreTranslate, int8, greedy", "LibreTranslate, int8, four beams"
OPPONENTS = {ARGOS_INT8: NATIVE_INT8, LIBRETRANSLATE: NATIVE_FINISHED}
"""What each system is compared with by BLEU."""


# -------------------------------------------------------------------------------------------------------------- running


@dataclass
class Found:
    """What the systems wrote for the same lines, and where the programs ran."""

    texts: dict[str, list[str]]
    num_parts: list[int]
    """Sentences that Argos Translate cuts each line into."""
    versions: dict[str, list[str]]


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    layout = common.find_student(options.run)
    config = load_model_config(layout.student / "float")
    pairs = spaced(load_split(layout.corpus, "test"), options.num_sentences)
    lines, references = [pair.source for pair in pairs], [pair.target for pair in pairs]
    request = {"source": config["source_language"], "target": config["target_language"], "lines": lines}
    options.work.mkdir(parents=True, exist_ok=True)
    native = {
        name: load_runtime("native", layout.student / folder, RuntimeSettings(num_threads=1))
        for name, folder in ((NATIVE_FLOAT, "float"), (NATIVE_INT8, "int8"))
    }
    found = Found({name: runtime.translate(lines) for name, runtime in native.items()}, [], {})
    packages = export_packages(layout, options.work)
    ask_argos(found, packages, request, options.work)
    if options.libretranslate:
        ask_libretranslate(found, packages["int8"], request, options.work)

    tokenizer, max_length = native[NATIVE_FLOAT].tokenizer, config["model"]["max_length"]
    limits = [limit_output(len(ids), max_length) for ids in tokenizer.encode(lines)]

    def find_comparable(name: str) -> list[bool]:
        texts = found.texts[name]
        lengths = [len(ids) for ids in tokenizer.encode(texts)]
        return are_comparable(texts, lengths, limits, found.num_parts)

    (bleu,) = build_metrics(["bleu"], MetricOptions(target_language=request["target"]))
    return {
        "run": str(options.run),
        "num_sentences": len(lines),
        "versions": found.versions,
        **compare_words(found.texts, lines, find_comparable(NATIVE_FLOAT)),
        **compare_scores(bleu, found.texts, references, find_comparable(NATIVE_INT8)),
    }


def export_packages(layout: RunLayout, work: Path) -> dict[str, Path]:
    """A package in each number format, made anew."""
    packages = {number_format: work / f"{number_format}.argosmodel" for number_format in ("float32", "int8")}
    for number_format, package in packages.items():
        package.unlink(missing_ok=True)
        export_model(ExportRequest(layout.student, "argos", package, number_format))
    return packages


def ask_argos(found: Found, packages: Mapping[str, Path], request: Mapping[str, Any], work: Path) -> None:
    environment = argos_programs.build_environment(work / "argos", argos_programs.ARGOS)
    found.versions["Argos Translate"] = environment.versions
    for name, number_format, settings in (
        (ARGOS_FLOAT, "float32", GREEDY | {"ARGOS_COMPUTE_TYPE": "float32"}),
        (ARGOS_INT8, "int8", GREEDY),
        (ARGOS_BEAMS, "int8", {}),
    ):
        print(name, flush=True)
        answers = argos_programs.translate_with_argos(
            environment.python, packages[number_format], work / "home_argos", request, settings
        )
        found.texts[name] = [answer["text"] for answer in answers]
        found.num_parts = [answer["sentences"] for answer in answers]


def ask_libretranslate(found: Found, package: Path, request: Mapping[str, Any], work: Path) -> None:
    environment = argos_programs.build_environment(work / "libretranslate", argos_programs.LIBRETRANSLATE)
    found.versions["LibreTranslate"] = environment.versions
    home, log = work / "home_libretranslate", work / "libretranslate.log"
    found.texts[NATIVE_FINISHED] = argos_programs.finish_as_libretranslate(
        environment.python, home, request["lines"], found.texts[NATIVE_INT8]
    )
    for name, settings in ((LIBRETRANSLATE, GREEDY), (LIBRETRANSLATE_BEAMS, {})):
        print(name, flush=True)
        with LibreTranslate(environment.python, package, home, log, settings) as server:
            found.texts[name] = server.translate(request)


# ------------------------------------------------------------------------------------------------------------ comparing


def are_comparable(
    texts: Sequence[str], lengths: Sequence[int], limits: Sequence[int], num_parts: Sequence[int]
) -> list[bool]:
    """Of our translations, with their lengths in tokens: where Argos Translate has no reason to write another."""
    return [
        parts == 1 and "_" not in text and length < limit
        for text, length, limit, parts in zip(texts, lengths, limits, num_parts, strict=True)
    ]


def compare_words(
    texts: Mapping[str, Sequence[str]], lines: Sequence[str], is_comparable: Sequence[bool]
) -> dict[str, Any]:
    """How often the float32 package says the same as the native float32 student, and where it does not."""
    rows = list(zip(lines, texts[NATIVE_FLOAT], texts[ARGOS_FLOAT], is_comparable, strict=True))
    same = [ours.strip() == theirs.strip() for _, ours, theirs, _ in rows]
    return {
        "num_comparable": sum(is_comparable),
        "num_same": sum(same),
        "num_comparable_same": sum(alike and row[3] for alike, row in zip(same, rows, strict=True)),
        "different": [
            {"source": line, "native": ours, "argos": theirs}
            for alike, (line, ours, theirs, counts) in zip(same, rows, strict=True)
            if counts and not alike
        ],
    }


def compare_scores(
    bleu: Metric, texts: Mapping[str, Sequence[str]], references: Sequence[str], is_comparable: Sequence[bool]
) -> dict[str, Any]:
    """BLEU of every system as it is and with blanks for underscores; of the latter, differences on all lines and on the
    comparable ones."""

    def blank(lines: Sequence[str]) -> list[str]:
        return [line.replace("_", " ") for line in lines]

    def total(statistics: Any) -> float:
        return float(bleu.score(statistics.sum(axis=0)))

    blanked = {name: bleu.statistics(blank(found), blank(references)) for name, found in texts.items()}
    places = {
        "all": list(range(len(references))),
        "comparable": [i for i, counts in enumerate(is_comparable) if counts],
    }
    compared: dict[str, Any] = {}
    for name, other in OPPONENTS.items():
        for which, chosen in places.items():
            if name in texts and chosen:
                counts = resampling_counts(len(chosen), evidence.NUM_DRAWS, evidence.DRAWS_SEED)
                compared.setdefault(which, {})[name] = evidence.plain_comparisons(
                    {"bleu": paired_bootstrap(bleu, blanked[other][chosen], blanked[name][chosen], counts)}
                )["bleu"]
    return {
        "num_comparable_int8": len(places["comparable"]),
        "bleu": {name: total(bleu.statistics(list(found), list(references))) for name, found in texts.items()},
        "bleu_without_underscores": {name: total(statistics) for name, statistics in blanked.items()},
        "compared": compared,
    }


# -------------------------------------------------------------------------------------------------------------- results


def find_failures(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each demand found wrong."""
    agreement = data["num_comparable_same"] / max(1, data["num_comparable"])
    few = {"float32": data["num_comparable"], "int8": data["num_comparable_int8"]}

    def find_losses(which: str) -> list[str]:
        compared = data["compared"].get(which, {})
        return [
            f"{name}: {evidence.describe_comparison(figures)}"
            for name, figures in compared.items()
            if -figures["difference"] > MAX_BLEU_LOSS
        ] + ([] if compared else ["not compared"])

    return {
        f"at least {MIN_COMPARABLE} lines are comparable": [
            f"{name}: {number}" for name, number in few.items() if number < MIN_COMPARABLE
        ],
        f"float32 translates {MIN_AGREEMENT:.0%} of the comparable lines as the native student": (
            [] if agreement >= MIN_AGREEMENT else [f"{agreement:.1%}"]
        ),
        f"int8 loses at most {MAX_BLEU_LOSS:g} BLEU on the comparable lines, beam for beam": find_losses("comparable"),
        f"int8 loses at most {MAX_BLEU_LOSS:g} BLEU on all lines, beam for beam, underscores aside": find_losses("all"),
    }


def format_results(data: Mapping[str, Any]) -> str:
    compared = data["compared"]

    def describe(which: str, name: str) -> str:
        figures = compared.get(which, {}).get(name)
        return evidence.describe_comparison(figures) if figures else ""

    rows = [
        [
            name,
            f"{value:.2f}",
            f"{data['bleu_without_underscores'][name]:.2f}",
            OPPONENTS.get(name, ""),
            describe("all", name),
            describe("comparable", name),
        ]
        for name, value in data["bleu"].items()
    ]
    header = ["system", "BLEU", "with blanks for underscores", "against", "all lines", "comparable lines"]
    return "\n".join(
        [
            f"# The .argosmodel package in Argos Translate and LibreTranslate: {data['run']}",
            "",
            f"{data['num_sentences']} test sentences, evenly spaced. {data['num_comparable']} of them are one sentence "
            "to Argos Translate, and the native float32 translation holds no underscore and ends before our limit "
            f"(int8: {data['num_comparable_int8']}). Of these the float32 package, decoded greedily, translates "
            f"{data['num_comparable_same']} as the native float32 student does ({data['num_same']} of all). "
            "Differences are with blanks for underscores on all sides, with 95 % intervals of a paired bootstrap.",
            "",
            evidence.markdown_table(header, rows),
            "",
            *evidence.describe_checks(find_failures(data)),
            "",
            *(f"- {name}: {describe_versions(versions)}" for name, versions in data["versions"].items()),
        ]
    )


def describe_versions(versions: Sequence[str]) -> str:
    """Those that matter; all of them are in the JSON."""
    environment = argos_programs.Environment(Path(), list(versions))
    names = ("argostranslate", "libretranslate", "argos-translate-lt", *argos_programs.PINNED)
    known = ((name, environment.find_version(name)) for name in names)
    return ", ".join(f"{name} {number}" for name, number in known if number is not None)


def main() -> int:
    parser = common.build_plain_parser("Install a run's student in Argos Translate and LibreTranslate.")
    parser.add_argument("--run", type=Path, default=Path("distillation_output"), metavar="RUN_DIR")
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME, help="environments and packages")
    parser.add_argument("--num-sentences", type=int, default=200, metavar="N")
    parser.add_argument("--libretranslate", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    data = run_benchmark(options)
    data["failures"] = find_failures(data)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
