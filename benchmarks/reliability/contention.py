"""What does a busy neighbour cost a training that uses all cores, with and without the command line's shorter spin?

A process takes steps (forward, backward, AdamW) of a small teacher on all cores, first alone and then beside a process
that keeps one core busy; with libgomp's own spinning, with the spin count that `cvm-translator` sets, and with none.
Settings take turns, and medians of the rounds are compared.

    python -m benchmarks.reliability.contention
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from benchmarks import common, evidence
from cvm_translator.cli.threads import SPIN_COUNT

NAME = "contention"
LIBRARY, OURS, PASSIVE = "libgomp's own", f"ours ({SPIN_COUNT})", "none (OMP_WAIT_POLICY=passive)"
SETTINGS: dict[str, dict[str, str]] = {
    LIBRARY: {},
    OURS: {"GOMP_SPINCOUNT": str(SPIN_COUNT)},
    PASSIVE: {"OMP_WAIT_POLICY": "passive"},
}
BUSY = "while True: pass"
ROWS, LENGTH = 32, 16
MIN_ALONE = 0.85
"""Share of the speed alone that the shorter spin must keep."""


def run_worker(num_cores: int, seconds: float) -> float:
    """Steps per second of this process, for so many seconds after a few steps that do not count."""
    import torch

    from cvm_translator.config.schema import ModelConfig
    from cvm_translator.models.transformer import CvmTransformer

    torch.set_num_threads(num_cores)
    torch.manual_seed(13)
    sizes = ModelConfig(dim=256, num_heads=4, feed_forward_dim=1024, encoder_layers=6, decoder_layers=3)
    model = CvmTransformer(sizes, vocab_size=4000)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids, mask = torch.randint(4, 4000, (ROWS, LENGTH)), torch.ones(ROWS, LENGTH, dtype=torch.bool)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            hidden, matrix = model(ids, mask, ids)
            loss = torch.nn.functional.cross_entropy((hidden @ matrix.t()).flatten(0, 1).float(), ids.flatten())
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):
        step()
    num_steps, start = 0, time.perf_counter()
    while time.perf_counter() < start + seconds:
        step()
        num_steps += 1
    return num_steps / (time.perf_counter() - start)


def measure(setting: str, num_cores: int, seconds: float, *, with_neighbour: bool) -> float:
    """Steps per second in a process of its own."""
    plain = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = ["benchmarks.reliability.contention", "--worker", str(seconds), "--cores", str(num_cores)]
    # A session of its own, as another user's or service's process has: Linux shares the cores between sessions.
    neighbour = subprocess.Popen([sys.executable, "-c", BUSY], start_new_session=True) if with_neighbour else None
    try:
        return float(common.ask_worker("a training process", command, plain | SETTINGS[setting]))
    finally:
        if neighbour is not None:
            neighbour.kill()
            neighbour.wait()


def format_results(data: dict[str, Any]) -> str:
    rows = [
        [name, f"{figures['alone']:.2f}", f"{figures['beside']:.2f}", f"{figures['beside'] / figures['alone']:.0%}"]
        for name, figures in data["settings"].items()
    ]
    return "\n".join(
        [
            "# A busy neighbour",
            "",
            *evidence.describe_checks(data["failures"]),
            "",
            f"Training steps per second of a 9 M parameter model on {data['num_cores']} cores, alone and beside a"
            f" process that keeps one core busy; medians of {data['rounds']} rounds of {data['seconds']:g} seconds.",
            "",
            evidence.markdown_table(["spinning", "alone", "beside a busy process", "kept"], rows),
        ]
    )


def main() -> int:
    parser = common.build_plain_parser("Measure training beside a busy process.")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--seconds", type=float, default=10.0, metavar="S", help="length of one measurement")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(run_worker(options.cores, options.worker))
        return 0
    found: dict[str, dict[str, list[float]]] = {name: {"alone": [], "beside": []} for name in SETTINGS}
    for _ in range(options.rounds):
        for name, figures in found.items():
            for place, values in figures.items():
                with_neighbour = place == "beside"
                values.append(measure(name, options.cores, options.seconds, with_neighbour=with_neighbour))
    settings = {
        name: {place: statistics.median(values) for place, values in figures.items()} for name, figures in found.items()
    }
    ours, library = settings[OURS], settings[LIBRARY]
    alone, gain = ours["alone"] / library["alone"], ours["beside"] / library["beside"]
    data = {
        "num_cores": options.cores,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "settings": settings,
        "measurements": found,
        "failures": {
            f"alone, ours keeps at least {MIN_ALONE:.0%} of the speed": [] if alone >= MIN_ALONE else [f"{alone:.0%}"],
            "beside a busy process, ours is faster": [] if gain > 1.0 else [f"{gain:.2f} times"],
        },
    }
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
