"""Losses and gradients that are not finite, and losses that leap, in many steps: does any of them reach the weights?

The product's own loop trains a model so small that a step takes moments. In random steps the loss becomes NaN,
infinite or a spike, or the gradient of one random weight becomes NaN or infinite while the loss stays what it is.
Everything that a step may move is compared before and after. Then, in loops of their own, three batches in a row are
spoilt. Checked are:

- every spoilt batch is skipped, and weights, moments, moving average and spike window are the same, byte for byte;
- no batch that was not spoilt is skipped: one bad batch causes no further skip;
- three in a row go back to the best checkpoint, whose weights are there byte for byte, and the loop ends as it should.

    python -m benchmarks.reliability.non_finite

It begins anew each time. The program ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import random
import shutil
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, evidence
from benchmarks.reliability.small_training import build_setup
from cvm_translator.checkpoints.folder import load_checkpoint
from cvm_translator.corpus.dataset import Batch
from cvm_translator.losses import LossParts
from cvm_translator.training.loop import TrainingLoop
from cvm_translator.training.resume import START
from cvm_translator.training.setup import LoopSetup
from cvm_translator.training.spikes import MIN_HISTORY
from cvm_translator.training.step import StepResult

NAME = "non_finite"
SPOILT_SHARE = 0.15
"""Of the steps of a long loop, never two in a row; its step budget allows twice as many."""
MIN_SPIKE, MAX_SPIKE = 1.5, 9.0
"""A spike is the loss times ten to such a power."""
NUM_IN_A_ROW = 3
SHORT_LOOP_STEPS = 40

CAUGHT = "every spoilt batch is skipped before anything moves, byte for byte"
ALONE = "no other batch is skipped"
RELOADED = "three in a row go back to the best checkpoint, byte for byte, and the loop ends as it should"


# ------------------------------------------------------------------------------------------------------------ spoiling


class SpoiltObjective:
    """An objective whose total passes through a function."""

    def __init__(self, objective: Any, spoil: Callable[[Tensor], Tensor]) -> None:
        self.objective, self.spoil = objective, spoil

    def __call__(self, batch: Batch, num_tokens: int) -> LossParts:
        parts: LossParts = self.objective(batch, num_tokens)
        return parts._replace(total=self.spoil(parts.total))

    def compile(self) -> None:
        self.objective.compile()


@contextmanager
def spoilt_loss(loop: TrainingLoop, factor: float) -> Iterator[None]:
    """The loss is multiplied by a number."""
    honest = loop.setup.objective
    loop.setup.objective = SpoiltObjective(honest, lambda total: total * factor)
    try:
        yield
    finally:
        loop.setup.objective = honest


@contextmanager
def spoilt_gradient(loop: TrainingLoop, value: float, generator: random.Random) -> Iterator[None]:
    """One number in the gradient of one random parameter is replaced."""
    parameter = generator.choice(list(loop.setup.model.parameters()))
    place = generator.randrange(parameter.numel())

    def replace(gradient: Tensor) -> Tensor:
        changed = gradient.clone()
        changed.view(-1)[place] = value
        return changed

    handle = parameter.register_hook(replace)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        handle.remove()


def draw_spoiling(kind: str, loop: TrainingLoop, generator: random.Random) -> Any:
    """A context in which a step is spoilt."""
    if kind == "loss NaN":
        return spoilt_loss(loop, math.nan)
    if kind == "loss infinite":
        return spoilt_loss(loop, generator.choice([math.inf, -math.inf]))
    if kind == "gradient NaN":
        return spoilt_gradient(loop, math.nan, generator)
    if kind == "gradient infinite":
        return spoilt_gradient(loop, generator.choice([math.inf, -math.inf]), generator)
    assert kind == "loss spike"
    return spoilt_loss(loop, 10 ** generator.uniform(MIN_SPIKE, MAX_SPIKE))


KINDS = ("loss NaN", "loss infinite", "gradient NaN", "gradient infinite", "loss spike")


# ------------------------------------------------------------------------------------------------------------ the loop


class WatchedLoop(TrainingLoop):
    """A loop that spoils the steps of a plan and looks at what each of them has moved."""

    def __init__(self, setup: LoopSetup) -> None:
        super().__init__(setup)
        self.plan: dict[int, str] = {}
        """Executed step to the kind of spoiling."""
        self.random = random.Random(0)
        self.caught: Counter[str] = Counter()
        self.escaped: list[str] = []
        self.skipped: list[str] = []
        self.num_clean_steps = 0
        self.is_reloaded = False
        """Whether the last rollback has put the best checkpoint's weights back."""

    def digest(self) -> str:
        """Of everything that a step may move."""
        digest = hashlib.sha256(repr(self.spikes.state_dict()).encode())
        tensors = [*self.setup.model.state_dict().values()]
        for state in self.optimizer.state_dict()["state"].values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        if self.average is not None:
            tensors += self.average.tensors.values()
            digest.update(str(self.average.num_updates).encode())
        for tensor in tensors:
            digest.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _step(self) -> StepResult:
        executed = self.state.executed_steps + 1
        kind = self.plan.get(executed)
        if kind is None:
            result = super()._step()
            self.num_clean_steps += 1
            if result.rejected is not None:
                self.skipped.append(f"step {executed}: {result.rejected}")
            return result
        before = self.digest()
        with draw_spoiling(kind, self, self.random):
            result = super()._step()
        if result.rejected is not None and self.digest() == before:
            self.caught[kind] += 1
        else:
            self.escaped.append(f"{kind} at step {executed}: {result.rejected or 'not skipped'}")
        return result

    def _roll_back(self, reason: str) -> None:
        target = load_checkpoint(self.setup.store.directory / (self.state.best_checkpoint or START))
        super()._roll_back(reason)
        self.is_reloaded = digest_tensors(self.setup.model.state_dict()) == digest_tensors(target.tensors["model"])


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def run_watched(loop: WatchedLoop) -> Any:
    try:
        return loop.run()
    finally:
        loop.setup.events.close()


# ------------------------------------------------------------------------------------------------------------- program


def draw_plan(num_steps: int, generator: random.Random) -> dict[int, str]:
    """Kinds in turn, in random steps of which no two are neighbours; spikes only where there is a history to judge."""
    chosen: list[int] = []
    for step in sorted(generator.sample(range(2, num_steps), int(SPOILT_SHARE * num_steps))):
        if not chosen or step > chosen[-1] + 1:
            chosen.append(step)
    kinds = [KINDS[number % len(KINDS)] for number in range(len(chosen))]
    generator.shuffle(kinds)
    num_early = sum(step <= MIN_HISTORY + 10 for step in chosen)
    for place in range(num_early):
        if kinds[place] == "loss spike":
            kinds[place] = "loss NaN"
    return dict(zip(chosen, kinds, strict=True))


def measure_single(work: Path, num_spoilt: int, num_steps: int, seed: int) -> dict[str, Any]:
    """Spoil single batches of one loop after the other until there are enough."""
    caught: Counter[str] = Counter()
    failures: dict[str, list[str]] = {CAUGHT: [], ALONE: []}
    num_clean, number = 0, 0
    while caught.total() + len(failures[CAUGHT]) < num_spoilt:
        folder = work / f"single_{number}"
        loop = WatchedLoop(build_setup(folder, num_steps, save_every=num_steps // 4))
        loop.plan, loop.random = draw_plan(num_steps, random.Random(seed + number)), random.Random(seed + number)
        run_watched(loop)
        caught += loop.caught
        num_clean += loop.num_clean_steps
        failures[CAUGHT] += [f"loop {number}, {text}" for text in loop.escaped]
        failures[ALONE] += [f"loop {number}, {text}" for text in loop.skipped]
        shutil.rmtree(folder)
        number += 1
    return {"caught": dict(caught), "num_clean_steps": num_clean, "num_loops": number, "failures": failures}


def measure_rows(work: Path, num_rows: int, seed: int) -> dict[str, Any]:
    """Spoil three batches in a row, a loop each; an earlier single one shows that it does not count."""
    failures: dict[str, list[str]] = {RELOADED: []}
    for number in range(num_rows):
        folder, generator = work / f"row_{number}", random.Random(seed + number)
        loop = WatchedLoop(build_setup(folder, SHORT_LOOP_STEPS))
        loop.random = generator
        first = generator.randrange(6, SHORT_LOOP_STEPS - NUM_IN_A_ROW)
        kinds = [kind for kind in KINDS if kind != "loss spike"]
        loop.plan = {first + place: generator.choice(kinds) for place in range(NUM_IN_A_ROW)}
        loop.plan[first - 2] = generator.choice(kinds)
        outcome = run_watched(loop)
        what, rollbacks = f"loop {number}, steps {first} to {first + 2}", outcome.state.rollbacks
        if len(rollbacks) != 1 or outcome.halted or outcome.state.step != SHORT_LOOP_STEPS:
            failures[RELOADED].append(f"{what}: {rollbacks}, halted {outcome.halted}, step {outcome.state.step}")
        elif not loop.is_reloaded:
            failures[RELOADED].append(f"{what}: other weights than the best checkpoint's")
        if loop.escaped or loop.skipped:
            failures[RELOADED].append(f"{what}: {loop.escaped + loop.skipped}")
        shutil.rmtree(folder)
    return {"num_rows": num_rows, "failures": failures}


def run_benchmark(options: Namespace) -> dict[str, Any]:
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    single = measure_single(work, options.num_spoilt, options.num_steps, options.seed)
    rows = measure_rows(work, options.num_rows, options.seed)
    return {
        "seed": options.seed,
        "num_steps": options.num_steps,
        **{key: value for key, value in {**single, **rows}.items() if key != "failures"},
        "failures": single["failures"] | rows["failures"],
    }


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the table as Markdown."""
    lines = ["# Losses and gradients that are not finite, and spikes", "", *evidence.describe_checks(data["failures"])]
    lines += [
        "",
        f"{sum(data['caught'].values()):,} single batches were spoilt and skipped among {data['num_clean_steps']:,}"
        f" others, in {data['num_loops']} loops of {data['num_steps']:,} steps; three in a row in {data['num_rows']}"
        " further loops.",
        "",
    ]
    rows = [[kind, data["caught"].get(kind, 0)] for kind in KINDS]
    return "\n".join([*lines, evidence.markdown_table(["what was spoilt", "caught"], rows)])


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Spoil losses and gradients and see that nothing moves.")
    parser.add_argument("--num-spoilt", type=int, default=1000, metavar="N", help="single batches")
    parser.add_argument("--num-steps", type=int, default=1000, metavar="N", help="of each of their loops")
    parser.add_argument("--num-rows", type=int, default=100, metavar="N", help="loops with three in a row")
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME)
    return parser


def main() -> int:
    options = build_parser().parse_args()
    data = run_benchmark(options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
