"""Running out of memory: told from other deaths by the kernel's own counters, answered with more micro-batches.

Micro-batches cut the same effective batch into smaller pieces, so the gradient is that of the whole batch as before.
The order of its sums is not, nor are the dropout masks: the trainer announces the next resume as inexact.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from cvm_translator.config import load_config
from cvm_translator.runs.heartbeat import Beat
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.micro_batches import read_factors, write_factor


def count_oom_kills(cgroups: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> dict[str, int]:
    """The kernel's counters of processes killed for memory: of this process's control group, and of the machine.

    Empty where there are none to read. A counter that grew while the trainer died of SIGKILL says why it died.
    """
    places = [proc / "vmstat"]
    with contextlib.suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            number, controllers, path = line.split(":", 2)
            if number == "0":
                places.append(cgroups / path.strip("/") / "memory.events")
            elif "memory" in controllers.split(","):
                places.append(cgroups / "memory" / path.strip("/") / "memory.oom_control")
    counters: dict[str, int] = {}
    for place in places:
        with contextlib.suppress(OSError, ValueError):
            for line in place.read_text().splitlines():
                if line.startswith("oom_kill "):
                    counters[str(place)] = int(line.split()[1])
    return counters


def has_grown(before: dict[str, int], after: dict[str, int]) -> bool:
    return any(after[name] > before.get(name, after[name]) for name in after)


def halve_micro_batches(layout: RunLayout, beat: Beat | None) -> str | None:
    """Let the stage that ran out of memory go on with twice as many micro-batches; returns it in words.

    None, and nothing is changed, where that cannot help: the memory ran out elsewhere than in a training step, or every
    micro-batch is one sentence already. With a token budget the trainer knows that, and tells it when it starts.
    """
    if beat is None or beat.phase != "step" or beat.stage not in ("teacher", "distil"):
        return None
    config = load_config(layout.config, [], layout.root)
    training = config.teacher.training if beat.stage == "teacher" else config.distillation
    factor = read_factors(layout.micro_batches).get(beat.stage, 1)
    before = min(training.max_sentences, factor * training.grad_accum_steps)
    if before >= training.max_sentences:
        return None
    write_factor(layout.micro_batches, beat.stage, 2 * factor)
    after = min(training.max_sentences, 2 * before)
    size = f"{training.max_sentences} {'sentences' if training.batch_tokens is None else 'tokens'}"
    return (
        f"{beat.stage} goes on with up to {after} micro-batches a step instead of {before}"
        f" and the same effective batch of {size}; not bit for bit from here on"
    )
