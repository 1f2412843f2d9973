"""Memory and time of the distillation loss with its gradients, against the naive formula and Liger's chunked loss.

What is measured is one forward and backward pass from hidden states (student's and teacher's) and output matrices to
the gradients of the student's, as a training step has it: float32 parameters, products in bfloat16. Each system runs in
processes of its own, in turn with the others; a process makes its tensors, warms up with one pass, and then reports
the time of a second one and by how much its peak memory rose above what was resident before. Medians over the
rounds are compared, and the losses and gradients of all systems must agree with a float64 pass on the first tokens.

Liger (https://github.com/linkedin/Liger-Kernel) is run as it comes and compiled, at the chunk sizes given, and each of
these counts. It comes with the extra `peers`, which is asked for before anything else; without Triton: pip install
--no-deps liger-kernel.

    python -m benchmarks.loss [--tokens 8192 --vocabulary 32000]
"""

from __future__ import annotations

import ctypes
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
from benchmarks.machine import describe_machine, read_machine
from cvm_translator.errors import import_optional
from cvm_translator.losses import DistillationLoss

NAME = "loss"
TEMPERATURE, ALPHA, BETA = 2.0, 0.8, 0.2
CHECKED_TOKENS = 64
TOLERANCE = 0.02
"""Relative error allowed to a gradient whose products are in bfloat16."""
OURS, NAIVE = "ours", "naive"
MAX_MEMORY = {NAIVE: 0.1, "liger": 0.5}
"""Our peak as a share of the others', at most."""


@dataclass(frozen=True)
class Problem:
    """Sizes of one pass."""

    tokens: int
    vocabulary: int
    student_dim: int
    teacher_dim: int


@dataclass
class Inputs:
    """What a training step hands to the loss: hidden states (N, D), matrices (V, D) and targets (N,)."""

    hidden: Tensor
    matrix: Tensor
    teacher_hidden: Tensor
    teacher_matrix: Tensor
    targets: Tensor

    @staticmethod
    def draw(problem: Problem) -> Inputs:
        generator = torch.Generator().manual_seed(13)

        def draw(rows: int, dim: int) -> Tensor:
            return torch.randn(rows, dim, generator=generator)

        return Inputs(
            draw(problem.tokens, problem.student_dim).requires_grad_(),
            draw(problem.vocabulary, problem.student_dim).mul_(problem.student_dim**-0.5).requires_grad_(),
            draw(problem.tokens, problem.teacher_dim),
            draw(problem.vocabulary, problem.teacher_dim).mul_(problem.teacher_dim**-0.5),
            torch.randint(problem.vocabulary, (problem.tokens,), generator=generator),
        )

    def head(self, tokens: int, dtype: torch.dtype = torch.float32) -> Inputs:
        """The first tokens, as leaves of their own."""
        return Inputs(
            self.hidden.detach()[:tokens].to(dtype).requires_grad_(),
            self.matrix.detach().to(dtype, copy=True).requires_grad_(),
            self.teacher_hidden[:tokens].to(dtype),
            self.teacher_matrix.to(dtype),
            self.targets[:tokens],
        )


# -------------------------------------------------------------------------------------------------------------- systems


def compute_naive(inputs: Inputs) -> Tensor:
    """The formula as it is usually written, with PyTorch's own functions on the whole logits."""
    student = inputs.hidden @ inputs.matrix.t()
    with torch.no_grad():
        teacher = inputs.teacher_hidden @ inputs.teacher_matrix.t()
    divergence = functional.kl_div(
        functional.log_softmax(_wide(student) / TEMPERATURE, -1),
        functional.log_softmax(_wide(teacher) / TEMPERATURE, -1),
        reduction="batchmean",
        log_target=True,
    )
    return ALPHA * TEMPERATURE**2 * divergence + BETA * functional.cross_entropy(_wide(student), inputs.targets)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def compute_ours(inputs: Inputs) -> Tensor:
    loss = DistillationLoss(TEMPERATURE, ALPHA, BETA)
    return loss(
        inputs.hidden,
        inputs.matrix,
        inputs.targets,
        num_tokens=inputs.targets.numel(),
        teacher_hidden=inputs.teacher_hidden,
        teacher_matrix=inputs.teacher_matrix,
    ).total


def build_liger(chunk_size: int, compiled: bool) -> Callable[[Inputs], Tensor]:
    """Liger's fused linear loss; its beta 0 is KL(teacher ‖ student), and T² goes into the weight."""
    chunked_loss = import_optional("liger_kernel.chunked_loss", "peers")
    loss = chunked_loss.LigerFusedLinearJSDLoss(
        weight_hard_loss=BETA,
        weight_soft_loss=ALPHA * TEMPERATURE**2,
        beta=0.0,
        temperature=TEMPERATURE,
        compiled=compiled,
        chunk_size=chunk_size,
    )

    def compute(inputs: Inputs) -> Tensor:
        result: Tensor = loss(
            inputs.hidden, inputs.matrix, inputs.teacher_hidden, inputs.teacher_matrix, inputs.targets
        )
        return result

    return compute


def build_system(name: str) -> Callable[[Inputs], Tensor]:
    """By its name: `ours`, `naive`, `liger CHUNK` or `liger CHUNK compiled`."""
    if name in (OURS, NAIVE):
        return {OURS: compute_ours, NAIVE: compute_naive}[name]
    _, chunk_size, *compiled = name.split()
    return build_liger(int(chunk_size), bool(compiled))


# ------------------------------------------------------------------------------------------------------------ a process


def run_pass(compute: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[float, float]:
    """Seconds of one forward and backward pass in bfloat16, and its loss."""
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        total = compute(inputs)
    torch.autograd.backward(total)
    return time.perf_counter() - start, float(total.detach())


def run_worker(name: str, problem: Problem) -> dict[str, float]:
    """One measured pass of a system, in this process, after one that compiles what there is to compile."""
    compute, inputs = build_system(name), Inputs.draw(problem)
    run_pass(compute, inputs)
    inputs.hidden.grad = inputs.matrix.grad = None
    _reset_peak()
    before = _read_memory("VmRSS")
    seconds, _ = run_pass(compute, inputs)
    peak = _read_memory("VmHWM") - before
    few = inputs.head(CHECKED_TOKENS)
    _, value = run_pass(compute, few)
    return {"seconds": seconds, "peak_mib": peak / 1024, "error": _relative_error(value, few)}


def _relative_error(value: float, few: Inputs) -> float:
    """The largest one of the loss's and the two gradients' distances from the naive formula's in float64."""
    exact = few.head(CHECKED_TOKENS, torch.float64)
    expected = compute_naive(exact)
    torch.autograd.backward(expected)
    pairs = ((few.hidden, exact.hidden), (few.matrix, exact.matrix))
    errors = [(_gradient(ours) - _gradient(theirs)).norm() / _gradient(theirs).norm() for ours, theirs in pairs]
    return max(abs(value / float(expected.detach()) - 1.0), *map(float, errors))


def _gradient(leaf: Tensor) -> Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _reset_peak() -> None:
    """What was freed goes back to the system first: what the C library keeps would count as resident before."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _read_memory(field: str) -> float:
    """A line of /proc/self/status in KiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{field}:"):
            return float(line.split()[1])
    raise BenchmarkError(f"/proc/self/status has no {field}: this benchmark needs Linux")


# -------------------------------------------------------------------------------------------------------------- program


def check(systems: dict[str, dict[str, float]]) -> dict[str, list[str]]:
    """What is claimed, with what speaks against it."""
    ours = systems[OURS]
    exact = f"losses and gradients are within {TOLERANCE:.0%} of float64"
    claims: dict[str, list[str]] = {exact: []}
    for name, figures in systems.items():
        if figures["error"] > TOLERANCE:
            claims[exact].append(f"{name}: {figures['error']:.1%}")
        if name == OURS:
            continue
        limit = MAX_MEMORY[name.split()[0]]
        memory, time_ = ours["peak_mib"] / figures["peak_mib"], ours["seconds"] / figures["seconds"]
        claims[f"our peak is at most {limit:g} of that of {name}"] = [] if memory <= limit else [f"{memory:.3f}"]
        claims[f"our pass takes no longer than that of {name}"] = [] if time_ <= 1.0 else [f"{time_:.2f} of it"]
    return claims


def format_results(data: dict[str, Any]) -> str:
    ours, problem = data["systems"][OURS], data["problem"]
    rows = [
        [
            name,
            f"{figures['peak_mib']:,.0f}",
            f"{figures['peak_mib'] / ours['peak_mib']:.2f}",
            f"{figures['seconds']:.2f}",
            f"{figures['seconds'] / ours['seconds']:.2f}",
            f"{figures['error']:.2%}",
        ]
        for name, figures in data["systems"].items()
    ]
    header = ["loss", "peak, MiB", "to ours", "seconds", "to ours", "error"]
    return "\n".join(
        [
            "# The distillation loss",
            "",
            *evidence.describe_checks(data["failures"]),
            "",
            f"One pass, forward and backward, over {problem['tokens']:,} tokens with a vocabulary of"
            f" {problem['vocabulary']:,}, student width {problem['student_dim']}, teacher width"
            f" {problem['teacher_dim']}; bfloat16 products, {data['threads']} threads, medians of {data['rounds']}"
            " rounds. Peak: above what was resident before the pass. Error: of loss and gradients against float64.",
            "",
            describe_machine(data["machine"]),
            "",
            evidence.markdown_table(header, rows),
        ]
    )


def main() -> int:
    parser = common.build_plain_parser("Compare the distillation loss with the naive one and with Liger's.")
    parser.add_argument("--tokens", type=int, default=8192, metavar="N")
    parser.add_argument("--vocabulary", type=int, default=32_000, metavar="V")
    parser.add_argument("--student-dim", type=int, default=512, metavar="D")
    parser.add_argument("--teacher-dim", type=int, default=768, metavar="D")
    parser.add_argument("--liger-chunks", default="1024,512", metavar="A,B,…", help="empty: leave Liger out")
    common.add_turn_options(parser)
    options = parser.parse_args()
    problem = Problem(options.tokens, options.vocabulary, options.student_dim, options.teacher_dim)
    if options.worker:
        print(json.dumps(run_worker(options.worker, problem)))
        return 0
    names = [OURS, NAIVE]
    for chunk in filter(None, options.liger_chunks.split(",")):
        names += [f"liger {chunk}", f"liger {chunk} compiled"]
    if options.liger_chunks:
        common.check_peers("liger_kernel.chunked_loss")
    turns = common.Turns("benchmarks.loss", names, asdict(problem), options)
    machine = read_machine("liger-kernel")
    systems = turns.measure()
    data = {
        "machine": machine,
        "problem": asdict(problem),
        "threads": options.threads,
        "rounds": options.rounds,
        "systems": systems,
        "failures": check(systems),
    }
    code = evidence.conclude(options.results, NAME, data, format_results(data))
    turns.forget()
    return code


if __name__ == "__main__":
    common.run_main(main)
