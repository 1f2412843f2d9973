"""Shared by the benchmarks: arms, and what their programs have in common. What arms left behind is in `evidence`.

An *arm* is one real pipeline run in a folder of its own. Guarantees: an arm that was killed carries on where it was,
one that is done is not run again, and a folder that another config made is refused. Arms of one benchmark share the
teacher (through `teacher.cache_dir`) and, by hard links that the pipeline verifies by hash, the corpus, the tokenizer
and the teacher's stored states.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from cvm_translator.config import RunConfig, load_config
from cvm_translator.errors import EXIT_GATE_FAILED, EXIT_OK, CvmError, import_optional
from cvm_translator.runs import atomic
from cvm_translator.runs.events import read_events
from cvm_translator.runs.layout import RunLayout

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
PROGRAM = (sys.executable, "-m", "cvm_translator")

SHARED_FOLDERS = ("corpus", "tokenizer", "tokenizer/train_tokens", "teacher/states")
_UNFINISHED = (".part", ".progress.json", ".lock")
"""Ends of the names of files that are still written into."""
_FREE_SETTINGS = ("output_dir", "tensorboard")
_POLL_SECONDS = 1.0


class BenchmarkError(CvmError):
    """A benchmark that cannot go on; one line, with the remedy."""


# ---------------------------------------------------------------------------------------------------------------- arms


@dataclass(frozen=True)
class Arm:
    """One pipeline run: a config, settings over it (later ones win), and its own folder."""

    name: str
    config: Path
    settings: tuple[str, ...]
    folder: Path

    @property
    def layout(self) -> RunLayout:
        return RunLayout(self.folder)

    def load_config(self) -> RunConfig:
        return load_config(self.config, list(self.settings), self.folder)

    def command(self, verb: str = "run") -> list[str]:
        """The product's own command for this arm: run or start."""
        settings = [part for setting in self.settings for part in ("--set", setting)]
        return [*PROGRAM, verb, str(self.config), *settings, "--output-dir", str(self.folder)]

    def is_done(self) -> bool:
        """Whether the final report is there; raises if the folder is another config's."""
        if self.layout.config.exists():
            plain = self.load_config().to_plain()
            held = yaml.safe_load(self.layout.config.read_text(encoding="utf-8"))
            different = [key for key in plain if key not in _FREE_SETTINGS and plain[key] != held.get(key)]
            if different:
                raise BenchmarkError(
                    f"{self.folder} holds a run with another config ({', '.join(different)} differ): "
                    "give another --work, or move the folder away"
                )
        return self.layout.final_report.exists()

    def describe_state(self) -> str:
        if self.is_done():
            return "done"
        steps = [event for event in read_events(self.layout.events) if event["kind"] == "train"]
        return f"at {steps[-1]['stage']} step {steps[-1]['step']}" if steps else "not begun"


def has_teacher(arm: Arm) -> bool:
    """Whether the arm's teacher is trained, and so in the cache that the arms share."""
    return any(
        event["kind"] == "stage_finished" and event["stage"] == "teacher" for event in read_events(arm.layout.events)
    )


def run_arms(
    arms: Sequence[Arm], num_jobs: int, num_threads: int, on_done: Callable[[Arm], object] | None = None
) -> None:
    """Run what is not done, `num_jobs` at a time; `on_done` is called after each arm that was run.

    The first arm goes alone until it has the teacher, so that only one trains it. An arm whose student fails the gate
    is done like any other; any other failure stops all arms (they save) and raises BenchmarkError.
    """
    waiting = [arm for arm in arms if not arm.is_done()]
    running: dict[Arm, subprocess.Popen[bytes]] = {}
    donor = next((arm for arm in arms if has_teacher(arm)), None)
    try:
        while waiting or running:
            for arm in [arm for arm, process in running.items() if process.poll() is not None]:
                _check_exit(arm, running.pop(arm).returncode)
                if on_done is not None:
                    on_done(arm)
            if donor is None and running:
                donor = next((arm for arm in running if has_teacher(arm)), None)
            while waiting and len(running) < (1 if donor is None else num_jobs):
                arm = waiting.pop(0)
                running[arm] = _launch(arm, donor, num_threads)
            time.sleep(_POLL_SECONDS)
    finally:
        for process in running.values():
            process.send_signal(signal.SIGTERM)
        for process in running.values():
            process.wait()


def _launch(arm: Arm, donor: Arm | None, num_threads: int) -> subprocess.Popen[bytes]:
    if donor is not None:
        share_folders(donor.folder, arm.folder)
    arm.layout.logs.mkdir(parents=True, exist_ok=True)
    print(f"{datetime.now():%H:%M:%S}  {arm.name} in {arm.folder}", flush=True)
    with open(arm.layout.logs / "benchmark.log", "ab") as log:
        return subprocess.Popen(
            [*arm.command(), "--no-progress"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the benchmark, which then asks each arm once to save and leave
            env=os.environ | {"OMP_NUM_THREADS": str(num_threads)},
        )


def _check_exit(arm: Arm, code: int) -> None:
    if code not in (EXIT_OK, EXIT_GATE_FAILED):
        last = find_last_line((arm.layout.logs / "benchmark.log").read_text(encoding="utf-8", errors="replace"))
        raise BenchmarkError(f"arm {arm.name} ended with exit code {code}: {last.removeprefix('error: ')}")


def share_folders(source: Path, target: Path) -> None:
    """Hard-link what a new run folder would build again. The pipeline replaces files and never writes into them."""
    for name in SHARED_FOLDERS:
        (target / name).mkdir(parents=True, exist_ok=True)
        for path in sorted((source / name).iterdir()) if (source / name).is_dir() else []:
            is_unfinished = path.name.startswith(atomic.TEMPORARY_PREFIX) or path.name.endswith(_UNFINISHED)
            is_finished = path.is_file() and not is_unfinished
            if is_finished and not (target / name / path.name).exists():
                os.link(path, target / name / path.name)


# ------------------------------------------------------------------------------------------------------- the programs


def find_last_line(text: str) -> str:
    """The last line that says something."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "it said nothing")


def find_student(run: Path) -> RunLayout:
    """The layout of a run with a float and an int8 student; BenchmarkError names what it lacks."""
    layout = RunLayout(run)
    for name in ("float", "int8"):
        if not (layout.student / name / "config.json").is_file():
            raise BenchmarkError(
                f"--run {run} has no student/{name}: name a finished run whose student has 8 bits (quantization.bits)"
            )
    return layout


def build_plain_parser(description: str) -> argparse.ArgumentParser:
    """The option that all benchmarks share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the .json and .md")
    return parser


def build_parser(description: str, config: Path, work: Path) -> argparse.ArgumentParser:
    """The options of benchmarks that train arms."""
    parser = build_plain_parser(description)
    parser.add_argument("--config", type=Path, default=config)
    parser.add_argument("--work", type=Path, default=work, help="folder of the runs; give it again to carry on")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all arms")
    parser.add_argument("--threads-per-arm", type=int, default=1, metavar="T")
    return parser


def ask_worker(name: str, command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The last line that `python -m COMMAND` prints in a process of its own; BenchmarkError says why it failed."""
    done = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, env=environment, cwd=REPOSITORY, check=False
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise BenchmarkError(f"{name} failed: {lines[-1] if lines else f'exit code {done.returncode} without a word'}")
    return done.stdout.splitlines()[-1]


def add_turn_options(parser: argparse.ArgumentParser) -> None:
    """The options of a program whose systems take turns (see `Turns`)."""
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="T")
    parser.add_argument("--worker", help=argparse.SUPPRESS)


def check_peers(*modules: str) -> None:
    """Refuse to begin without the libraries of the extra `peers`: their turn comes when others have worked for long."""
    for module in modules:
        import_optional(module, "peers")


def hash_code() -> str:
    """Of what a measurement depends on: this package and the program."""
    folders = (REPOSITORY / "benchmarks", REPOSITORY / "cvm_translator")
    paths = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return atomic.sha256_json({str(path.relative_to(REPOSITORY)): atomic.sha256_file(path) for path in paths})


@dataclass(frozen=True)
class Turns:
    """Systems that take turns, a process each: in every round `--worker NAME` of a module is asked once for each name.

    Finished rounds are kept in a file beside the results, from which an interrupted benchmark goes on; with other code
    or another problem it begins anew.
    """

    module: str
    names: Sequence[str]
    problem: Mapping[str, Any]
    """Options of the worker; None ones are left out."""
    options: argparse.Namespace

    @property
    def path(self) -> Path:
        folder: Path = self.options.results / "work"
        return folder / f"{self.module}-{atomic.sha256_json(dict(self.problem))[:8]}.rounds.json"

    def ask(self) -> list[dict[str, dict[str, Any]]]:
        """What each system said in each round."""
        question = {"names": list(self.names), "threads": self.options.threads, "code": hash_code()}
        rounds = self._read(question)
        sizes = [f"--{key.replace('_', '-')}={value}" for key, value in self.problem.items() if value is not None]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.options.threads), "TOKENIZERS_PARALLELISM": "false"}
        for number in range(len(rounds), self.options.rounds):
            answers = {
                name: json.loads(ask_worker(name, [self.module, "--worker", name, *sizes], environment))
                for name in self.names
            }
            rounds.append(answers)
            atomic.write_json(self.path, {"question": question, "rounds": rounds})
            print(f"round {number + 1} of {self.options.rounds} is done", flush=True)
        return rounds[: self.options.rounds]

    def measure(self) -> dict[str, dict[str, float]]:
        """Medians over the rounds, where all answers are numbers."""
        rounds = self.ask()
        return {
            name: {key: statistics.median(round_[name][key] for round_ in rounds) for key in rounds[0][name]}
            for name in self.names
        }

    def forget(self) -> None:
        """The rounds, once their results are written."""
        self.path.unlink(missing_ok=True)

    def _read(self, question: Mapping[str, Any]) -> list[dict[str, dict[str, Any]]]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            kept = atomic.read_json(self.path)
            if kept["question"] == question:
                print(f"{len(kept['rounds'])} rounds are taken from {self.path}", flush=True)
                return list(kept["rounds"])
        return []


def run_main(main: Callable[[], int]) -> None:
    """Leave with main's exit code; an error is one line, and SIGTERM lets the arms save first."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        sys.exit(main())
    except CvmError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
