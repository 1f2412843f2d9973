"""The systems that `decoding` measures, what is demanded of them, and the tables.

A demand is a ratio of speeds or a difference in BLEU between two systems. Those of the deployed model are made in
batches of the size that `cvm-translator translate` gives it by default; what it shows in others is in the table too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import evidence
from benchmarks.runtime_teams import CT2_ISA
from cvm_translator.models.runtimes.ctranslate2 import Ctranslate2Runtime

DEPLOYED_BATCH_SIZE = Ctranslate2Runtime.best_batch_size


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
    System("native, 4 bits", "native", "int4"),
    System("CTranslate2, float32", "ctranslate2", "float32", False),
    System("CTranslate2, int8", "ctranslate2", "int8", False),
    System("CTranslate2, int8, vocabulary map", "ctranslate2", "int8", True),
    System("ONNX Runtime, float32", "onnx", "float32"),
    System("ONNX Runtime, int8", "onnx", "int8"),
)
TEACHER, BASELINE, FLOAT32, BFLOAT16 = (system.name for system in SYSTEMS[:4])
INT8, MAPPED = SYSTEMS[7].name, SYSTEMS[8].name


# --------------------------------------------------------------------------------------------------------------- claims


@dataclass(frozen=True)
class Demand:
    """What one system must show against another."""

    name: str
    other: str
    limit: float
    """At least so many times the tokens a second; or, of `LOSSES`, at most so much less BLEU."""
    is_deployed: bool = False
    """Whether it is demanded in batches of DEPLOYED_BATCH_SIZE only."""


SPEEDS = (
    Demand(INT8, BASELINE, 3.0),
    Demand(FLOAT32, BASELINE, 1.5),
    Demand(BFLOAT16, BASELINE, 3.0),
    Demand(MAPPED, INT8, 1.2, is_deployed=True),
    Demand(MAPPED, TEACHER, 8.0, is_deployed=True),
)
LOSSES = (
    Demand(MAPPED, INT8, 0.2, is_deployed=True),
    Demand(BFLOAT16, FLOAT32, 0.1, is_deployed=True),
)


@dataclass(frozen=True)
class Claim:
    """A demand, and what was found in batches of each size: a figure, and whether it is enough."""

    text: str
    found: Mapping[int, tuple[str, bool]]
    demanded: Sequence[int]

    def list_failures(self) -> list[str]:
        missing = [f"batch {size}: not measured" for size in self.demanded if size not in self.found]
        short = [
            f"batch {size}: {self.found[size][0]}" for size in self.demanded if not self.found.get(size, ("", True))[1]
        ]
        return missing + short

    def format_cell(self, size: int) -> str:
        if size not in self.found:
            return ""
        figure, is_enough = self.found[size]
        cell = f"{figure}: {'yes' if is_enough else 'no'}"
        return cell if size in self.demanded else f"({cell})"


def list_claims(data: Mapping[str, Any]) -> list[Claim]:
    """What is demanded of the results, with what they show."""
    sizes: list[int] = data["batch_sizes"]
    claims = []
    for demand in SPEEDS:
        ratios = {size: compute_ratio(data, demand.name, demand.other, size) for size in sizes}
        text = f"{demand.name}: at least {demand.limit:g} times the tokens of {demand.other}"
        found = {size: (f"{ratio:.2f}×", ratio >= demand.limit) for size, ratio in ratios.items()}
        claims.append(Claim(text, found, [DEPLOYED_BATCH_SIZE] if demand.is_deployed else sizes))
    for demand in LOSSES:
        compared = data["compared"][f"{demand.name} against {demand.other}"]
        text = f"{demand.name}: at most {demand.limit:g} BLEU less than {demand.other}"
        found = {
            int(size): (describe_change(figures), -figures["difference"] <= demand.limit)
            for size, figures in compared.items()
        }
        claims.append(Claim(text, found, [DEPLOYED_BATCH_SIZE]))
    return claims


def find_failures(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each demand found wrong."""
    return {
        f"{claim.text}, in batches of {' and '.join(map(str, claim.demanded))}": claim.list_failures()
        for claim in list_claims(data)
    }


def compute_ratio(data: Mapping[str, Any], name: str, other: str, batch_size: int) -> float:
    """Tokens a second of one system over another's."""
    rates = data["rates"]
    return float(rates[name][str(batch_size)]["median"] / rates[other][str(batch_size)]["median"])


def describe_change(figures: Mapping[str, float]) -> str:
    """+0.05 [-0.02, +0.12]"""
    return f"{figures['difference']:+.2f} [{figures['low']:+.2f}, {figures['high']:+.2f}]"


# -------------------------------------------------------------------------------------------------------------- results


def format_results(data: Mapping[str, Any]) -> str:
    claims = list_claims(data)
    columns = [f"batch {size}" for size in data["batch_sizes"]]
    asked = [[claim.text, *(claim.format_cell(size) for size in data["batch_sizes"])] for claim in claims]
    return "\n".join(
        [
            f"# Decoding a student of {data['num_parameters'] / 1e6:.1f} million parameters",
            "",
            describe_conditions(data),
            "",
            evidence.markdown_table(["runtime", *columns, "BLEU", "against float32", "MiB"], list_rows(data)),
            "",
            "What is demanded, in brackets where it is not demanded at this batch size; differences in BLEU with their "
            f"95 % intervals, {data['num_scored']:,} sentences each:",
            "",
            evidence.markdown_table(["", *columns], asked),
            "",
            *evidence.describe_checks(find_failures(data)),
            "",
            f"Tokens a second of one try of each arrangement, {' / '.join(list_tried(data))} (processes × threads):",
            "",
            evidence.markdown_table(["runtime", *columns], list_trials(data)),
        ]
    )


def describe_conditions(data: Mapping[str, Any]) -> str:
    machine = data["machine"]
    cores = machine["cores"]
    timed = ", ".join(f"{number:,} in batches of {size}" for size, number in data["num_timed"].items())
    isa = f"with {CT2_ISA}={machine['ct2_isa']}" if machine["ct2_isa"] else "with the instruction set that it chose"
    libraries = ", ".join(f"{name} {number}" for name, number in machine["libraries"].items())
    return (
        f"The student of {data['run']} in each runtime. Tokens a second, greedy, from ids to ids: medians of "
        f"{data['num_rounds']} interleaved rounds on {len(cores)} cores (numbers {', '.join(map(str, cores))}) of "
        f"{machine['processor']}, load {machine['load_at_start']:.1f} before; test sentences: {timed}. In brackets how "
        f"many times the speed of Transformers with this student. Every system was offered the same arrangements of "
        f"these cores, a process with a thread a core, one with a single thread, or one with a single thread on each "
        f"core; it has at each batch size what was fastest in a try. CTranslate2 ran {isa}. BLEU of "
        f"{data['num_scored']:,} test sentences, in batches of {DEPLOYED_BATCH_SIZE} (the default of cvm-translator "
        f"translate for CTranslate2), with the difference to the native float32 student and its 95 % interval. "
        f"{libraries}."
    )


def list_rows(data: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for system in SYSTEMS:
        scored = data["scores"][system.name]
        cells = [
            f"{data['rates'][system.name][str(size)]['median']:,.0f} "
            f"({compute_ratio(data, system.name, BASELINE, size):.1f}×)"
            for size in data["batch_sizes"]
        ]
        megabytes = f"{data['sizes'][system.name] / 2**20:.1f}"
        rows.append([system.name, *cells, f"{scored['bleu']:.2f}", describe_change(scored), megabytes])
    return rows


def list_tried(data: Mapping[str, Any]) -> list[str]:
    return list(data["rates"][BASELINE][str(data["batch_sizes"][0])]["trials"])


def list_trials(data: Mapping[str, Any]) -> list[list[str]]:
    """The chosen arrangement's figure is bold."""
    rows = []
    for system in SYSTEMS:
        measured = [data["rates"][system.name][str(size)] for size in data["batch_sizes"]]
        cells = [
            " / ".join(
                f"**{rate:,.0f}**" if name == found["arrangement"] else f"{rate:,.0f}"
                for name, rate in found["trials"].items()
            )
            for found in measured
        ]
        rows.append([system.name, *cells])
    return rows
