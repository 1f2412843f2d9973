"""What a run uses of its machine: processor, memory, disk, and the graphics cards where there are any.

Guarantees: looking never fails and never waits. A process that is gone, elsewhere or not ours to see has no figures; a
machine without `nvidia-smi`, or with one that does not answer, has no cards. Cards are asked in a thread of their own.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cvm_translator.observe.status import free_bytes
from cvm_translator.observe.text import as_number
from cvm_translator.runs.lock import process_start_time

GPU_FIELDS = ("index", "name", "utilization.gpu", "memory.used", "memory.total", "temperature.gpu")
GPU_SECONDS = 10.0
"""How often cards are asked, and how long they may take to answer."""


@dataclass(frozen=True)
class Gpu:
    """One card; NaN where it does not tell."""

    index: str
    name: str
    utilization_percent: float
    memory_used_mib: float
    memory_total_mib: float
    temperature_celsius: float


@dataclass(frozen=True)
class MachineFigures:
    """The newest look."""

    process: Mapping[str, float] | None = None
    """cpu_percent, memory_mib and num_threads of the run's process."""
    disk_free_bytes: int | None = None
    gpus: tuple[Gpu, ...] = field(default=())


class MachineWatch:
    """Looks at the machine on every beat of the monitor."""

    def __init__(self, root: Path) -> None:
        self._root, self._process, self._gpus = root, ProcessWatch(), GpuWatch()
        self.figures = MachineFigures()

    def look(self, holder: Mapping[str, Any] | None) -> None:
        self.figures = MachineFigures(self._process.measure(holder), free_bytes(self._root), self._gpus.measure())


class GpuWatch:
    """The NVIDIA cards of this machine, from `nvidia-smi`."""

    def __init__(self) -> None:
        self._program = shutil.which("nvidia-smi")
        self._gpus: tuple[Gpu, ...] = ()
        self._thread: threading.Thread | None = None
        self._asked_at = -GPU_SECONDS

    def measure(self) -> tuple[Gpu, ...]:
        """The last answer; asks anew, without waiting, where that is old."""
        is_asking = self._thread is not None and self._thread.is_alive()
        if self._program is not None and not is_asking and time.monotonic() - self._asked_at >= GPU_SECONDS:
            self._asked_at = time.monotonic()
            self._thread = threading.Thread(target=self._ask, name="nvidia-smi", daemon=True)
            self._thread.start()
        return self._gpus

    def _ask(self) -> None:
        command = [str(self._program), f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits"]
        answer = ""
        with contextlib.suppress(OSError, subprocess.SubprocessError, UnicodeDecodeError):
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=GPU_SECONDS, check=True
            )
            answer = done.stdout
        self._gpus = parse_gpus(answer)


def parse_gpus(answer: str) -> tuple[Gpu, ...]:
    """The lines of nvidia-smi; what is no such line is left out."""
    rows = [[part.strip() for part in line.split(",")] for line in answer.splitlines()]
    return tuple(
        Gpu(row[0], ", ".join(row[1:-4]), *(as_number(part) for part in row[-4:]))
        for row in rows
        if len(row) >= len(GPU_FIELDS)
    )


class ProcessWatch:
    """Processor and memory use of the run's process and its children."""

    def __init__(self) -> None:
        self._process: Any = None

    def measure(self, holder: Mapping[str, Any] | None) -> dict[str, float] | None:
        """Figures of the process that holds the run's lock, or None where it is gone, elsewhere or not ours to see.

        A process with another start time is a stranger under a reused id.
        """
        import psutil

        pid = (holder or {}).get("pid")
        if (
            holder is None
            or not isinstance(pid, int)
            or holder.get("host", socket.gethostname()) != socket.gethostname()
        ):
            return None
        if holder.get("process_start_time") not in (None, process_start_time(pid)):
            return None
        try:
            if self._process is None or self._process.pid != pid:
                self._process = psutil.Process(pid)
            family = [self._process, *self._process.children(recursive=True)]
            memory = sum(process.memory_info().rss for process in family)
            return {
                "cpu_percent": self._process.cpu_percent(),
                "memory_mib": memory / 2**20,
                "num_threads": float(self._process.num_threads()),
            }
        except psutil.Error:
            self._process = None
            return None
