"""Runtimes at work on given cores: processes that keep a model loaded, timed from ids to ids.

Every system is offered the same arrangements of the same cores (see `list_arrangements`); where several processes work
side by side, the batches are dealt to them in turn and are those that one process would make. Processes are pinned to
their cores, a failing one's last line is told, and all end with the benchmark. Memory: every system holds its model
once for each core.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from benchmarks import common
from benchmarks.common import BenchmarkError
from cvm_translator.models.runtimes.base import cut_batches

Sources = Sequence[Sequence[int]]

CT2_ISA = "CT2_FORCE_CPU_ISA"
AVX512_FLAGS = frozenset({"avx512f", "avx512cd", "avx512vl", "avx512bw", "avx512dq"})
"""What CTranslate2's AVX-512 code needs of a processor."""


# ------------------------------------------------------------------------------------------------------------ the cores


@dataclass(frozen=True)
class Arrangement:
    """How a system uses the cores."""

    num_processes: int
    num_threads: int
    """Of each process."""

    def __str__(self) -> str:
        return f"{self.num_processes} × {self.num_threads}"


def list_arrangements(num_cores: int) -> list[Arrangement]:
    """One process with a thread a core, one with a single thread, and one with a single thread on each core."""
    found = (Arrangement(1, num_cores), Arrangement(1, 1), Arrangement(num_cores, 1))
    return list(dict.fromkeys(found))


def deal_batches(sources: Sources, batch_size: int, num_processes: int) -> list[list[Sequence[int]]]:
    """What each process gets: batches of like lengths in turn, longest first; it cuts its share into the same ones."""
    hands: list[list[Sequence[int]]] = [[] for _ in range(num_processes)]
    for place, chosen in enumerate(cut_batches(sources, batch_size)):
        hands[place % num_processes] += [sources[i] for i in chosen]
    return hands


def read_processor(field: str) -> str:
    """A field of the first processor in /proc/cpuinfo, such as `model name` or `flags`; empty if it is not known."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return next(
        (value.strip() for name, _, value in (line.partition(":") for line in lines) if name.strip() == field), ""
    )


def find_ct2_isa(environment: Mapping[str, str] = os.environ, flags: str | None = None) -> str | None:
    """What CTranslate2 is told to compute with: the user's choice, else AVX-512 where the processor has it (on
    processors that are not Intel's it would take AVX2); None leaves the choice to it."""
    if CT2_ISA in environment:
        return environment[CT2_ISA]
    known = read_processor("flags") if flags is None else flags
    return "AVX512" if set(known.split()) >= AVX512_FLAGS else None


# -------------------------------------------------------------------------------------------------------- the processes


class Worker:
    """A process that has one system loaded and answers requests."""

    def __init__(self, name: str, command: Sequence[str], num_cores: int) -> None:
        environment = {key: value for key, value in os.environ.items() if key != "MKL_NUM_THREADS"}
        environment |= {"OMP_NUM_THREADS": str(num_cores), "PYTHONPATH": str(common.REPOSITORY)}
        if (isa := find_ct2_isa()) is not None:
            environment[CT2_ISA] = isa
        self._name = name
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the process)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            cwd=common.REPOSITORY,
        )

    def send(self, **request: Any) -> None:
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def receive(self) -> Any:
        assert self._process.stdout
        answer = self._process.stdout.readline()
        if not answer:
            self._fail()
        return json.loads(answer)

    def _fail(self) -> NoReturn:
        code = self._process.wait()
        self._errors.seek(0)
        last = common.find_last_line(self._errors.read().decode("utf-8", errors="replace"))
        raise BenchmarkError(f"the worker of {self._name} ended with exit code {code}: {last}")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(BrokenPipeError):
                if stream is not None:
                    stream.close()


class Team:
    """The processes of one system, as many as there are cores; how many of them work is its arrangement."""

    def __init__(self, name: str, runtime: str, folder: Path, precision: str, cores: Sequence[int]) -> None:
        self._cores = list(cores)
        command = [sys.executable, "-m", "benchmarks.runtime_teams", runtime, str(folder.absolute()), precision]
        self._workers = [Worker(name, command, len(cores)) for _ in cores]
        self._working: list[Worker] = []

    def __enter__(self) -> Team:
        """Returns when the libraries are imported, so that nothing goes on beside what is timed first."""
        try:
            for worker in self._workers:
                worker.send(do="hold", sources=[])
            for worker in self._workers:
                worker.receive()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()

    def arrange(self, arrangement: Arrangement) -> None:
        """Returns when every process that will work has its model loaded."""
        self._working = self._workers[: arrangement.num_processes]
        is_alone = arrangement.num_processes == 1
        for worker, core in zip(self._working, self._cores, strict=False):
            cores = self._cores if is_alone else [core]
            worker.send(do="arrange", cores=cores, num_threads=arrangement.num_threads)
        for worker in self._working:
            worker.receive()

    def time(self, sources: Sources, batch_size: int) -> float:
        """Tokens a second, end marks counted, from the first process's start to the last one's end."""
        hands = deal_batches(sources, batch_size, len(self._working))
        for worker, hand in zip(self._working, hands, strict=True):
            worker.send(do="hold", sources=hand)
            worker.receive()
        for worker in self._working:
            worker.send(do="time", batch_size=batch_size)
        answers = [worker.receive() for worker in self._working]
        seconds = max(answer["end"] for answer in answers) - min(answer["start"] for answer in answers)
        return float(sum(answer["num_tokens"] for answer in answers) / seconds)

    def translate(self, texts: Sequence[str], batch_size: int) -> list[str]:
        """By the first of the processes that work."""
        self._working[0].send(do="translate", texts=list(texts), batch_size=batch_size)
        answer: list[str] = self._working[0].receive()
        return answer


# ------------------------------------------------------------------------------------------------ inside such a process


class Desk:
    """What a worker's process knows: how to load its system, and what it holds."""

    def __init__(self, runtime: str, folder: str, precision: str) -> None:
        self._runtime, self._folder, self._precision = runtime, folder, precision
        self._num_threads = 0
        self._loaded: Any = None
        self._sources: list[list[int]] = []

    def arrange(self, cores: list[int], num_threads: int) -> None:
        """Pin every thread there is, and those to come; load the system for so many threads."""
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(int(task), cores)
        if num_threads != self._num_threads:
            from cvm_translator.models.runtimes import RuntimeSettings, load_runtime

            self._loaded = None
            settings = RuntimeSettings(num_threads=num_threads, precision=self._precision)
            self._loaded = load_runtime(self._runtime, self._folder, settings)
            self._num_threads = num_threads

    def hold(self, sources: list[list[int]]) -> None:
        self._sources = sources

    def time(self, batch_size: int) -> dict[str, float]:
        """Start and end are on the machine's clock, which all processes share."""
        start = time.monotonic()
        outputs = self._loaded.translate_ids(self._sources, batch_size=batch_size)
        end = time.monotonic()
        return {"start": start, "end": end, "num_tokens": sum(len(output) + 1 for output in outputs)}

    def translate(self, texts: list[str], batch_size: int) -> list[str]:
        found: list[str] = self._loaded.translate(texts, batch_size=batch_size)
        return found


def run_worker(runtime: str, folder: str, precision: str) -> None:
    """JSON requests on standard input, one answer each; leaves when there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    desk = Desk(runtime, folder, precision)
    known: dict[str, Callable[..., Any]] = {
        "arrange": desk.arrange,
        "hold": desk.hold,
        "time": desk.time,
        "translate": desk.translate,
    }
    for line in sys.stdin:
        request = json.loads(line)
        answer = known[request.pop("do")](**request)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    run_worker(*sys.argv[1:])
