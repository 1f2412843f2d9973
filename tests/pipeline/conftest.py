"""A real task that a tiny model learns in seconds, German number words to English ones, and real runs of it."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from cvm_translator.runs.events import EventTail, read_events
from cvm_translator.runs.schema import load_event_schema
from tests.programs import launch

_GERMAN_ONES = "null ein zwei drei vier fünf sechs sieben acht neun zehn elf zwölf"
_GERMAN_ONES += " dreizehn vierzehn fünfzehn sechzehn siebzehn achtzehn neunzehn"
_GERMAN_TENS = "- zehn zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig"
_ENGLISH_ONES = "zero one two three four five six seven eight nine ten eleven twelve"
_ENGLISH_ONES += " thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_ENGLISH_TENS = "- ten twenty thirty forty fifty sixty seventy eighty ninety"
GERMAN_ONES, GERMAN_TENS = _GERMAN_ONES.split(), _GERMAN_TENS.split()
ENGLISH_ONES, ENGLISH_TENS = _ENGLISH_ONES.split(), _ENGLISH_TENS.split()


def german(number: int) -> str:
    """Number words of 0 to 9999, with a blank after thousands and hundreds (easier to cut into pieces)."""
    parts = []
    if number >= 1000:
        parts.append(GERMAN_ONES[number // 1000] + "tausend")
    if number % 1000 >= 100:
        parts.append(GERMAN_ONES[number % 1000 // 100] + "hundert")
    rest = number % 100
    if rest == 1:
        parts.append("eins")
    elif 0 < rest < 20:
        parts.append(GERMAN_ONES[rest])
    elif rest:
        ones = GERMAN_ONES[rest % 10] + "und" if rest % 10 else ""
        parts.append(ones + GERMAN_TENS[rest // 10])
    return " ".join(parts) or "null"


def english(number: int) -> str:
    """British style: three thousand two hundred and twelve."""
    parts = []
    if number >= 1000:
        parts.append(f"{ENGLISH_ONES[number // 1000]} thousand")
    if number % 1000 >= 100:
        parts.append(f"{ENGLISH_ONES[number % 1000 // 100]} hundred")
    rest = number % 100
    if rest:
        ones = f"-{ENGLISH_ONES[rest % 10]}" if rest % 10 else ""
        word = ENGLISH_ONES[rest] if rest < 20 else ENGLISH_TENS[rest // 10] + ones
        parts.append(f"and {word}" if parts else word)
    return " ".join(parts) or "zero"


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with nested changes; neither is altered."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


MODEL = {"dim": 64, "num_heads": 2, "feed_forward_dim": 128, "encoder_layers": 1, "decoder_layers": 1}
MODEL |= {"dropout": 0.0, "max_length": 48}
TRAINING = {"batch_size": 64, "learning_rate": 5.0e-3}

# Accumulation, averaging, dropout and late quantisation, so that a resume has something to get wrong.
CONFIG: dict[str, Any] = {
    "num_threads": 1,
    "deterministic": True,  # where the machine has a GPU
    "corpus": {"validation_size": 100, "test_size": 100, "cleaning": {"language_check": False}},
    "tokenizer": {"vocab_size": 360},
    "teacher": {
        "model": MODEL | {"dropout": 0.05},
        "training": TRAINING
        | {"num_iterations": 120, "warmup_steps": 20, "validate_every_steps": 60, "checkpoint_every_steps": 15},
    },
    "student": {"model": MODEL | {"dropout": 0.02}},
    "distillation": TRAINING
    | {"num_iterations": 160, "warmup_steps": 20, "temperature": 1.0, "checkpoint_every_steps": 10}
    | {"grad_accum_steps": 2, "ema_decay": 0.8},
    "validation": {"every_steps": 40, "metrics": ["bleu", "chrf"], "weights": {"bleu": 1.0, "chrf": 1.0}},
    "quantization": {"method": "qat", "bits": 8, "start_fraction": 0.5},
}


@dataclasses.dataclass(frozen=True)
class Finished:
    """What a process left behind."""

    exit_code: int
    output: str
    errors: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.errors.splitlines() if line.startswith("error:")]


class Program:
    """`python -m cvm_translator ...` as a process of its own."""

    def __init__(self, folder: Path, *arguments: str | Path) -> None:
        self._output, self._errors = folder / f".out-{time.monotonic_ns()}", folder / f".err-{time.monotonic_ns()}"
        self._process = launch("cvm_translator", [*map(str, arguments)], self._output, self._errors, folder)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process.is_alive()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def errors_so_far(self) -> str:
        return self._errors.read_text() if self._errors.exists() else ""

    def finish(self) -> Finished:
        self._process.join(100)
        assert self._process.exitcode is not None, "still running"
        texts = [path.read_text() if path.exists() else "" for path in (self._output, self._errors)]
        return Finished(self._process.exitcode, *texts)

    def kill(self) -> Finished:
        self._process.kill()
        return self.finish()


@dataclasses.dataclass
class Numbers:
    """The task in a folder: its text, its configs, its runs."""

    folder: Path
    teachers: Path
    """Cache of trained teachers, for runs that are not about the teacher."""
    programs: list[Program] = dataclasses.field(default_factory=list)

    def write_config(self, name: str, **changes: Any) -> Path:
        """configs/NAME.yaml with nested changes to the common one."""
        text = self.folder / "numbers.tsv"
        if not text.exists():
            chosen = random.Random(5).sample(range(10_000), 2500)
            text.write_text("".join(f"{german(n)}\t{english(n)}\n" for n in chosen), encoding="utf-8")
        config = merge(merge(CONFIG, {"corpus": {"train": [{"format": "tsv", "path": "numbers.tsv"}]}}), changes)
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    def start(self, *arguments: str | Path) -> Program:
        program = Program(self.folder, *arguments)
        self.programs.append(program)
        return program

    def run(self, *arguments: str | Path) -> Finished:
        return self.start(*arguments).finish()

    def start_run(self, config: Path, run_dir: Path, *more: str) -> Program:
        return self.start("run", config, "--output-dir", run_dir, "--no-progress", *more)


def run_real(folder: Path, *arguments: str | Path) -> Finished:
    """The command as a user types it, libraries imported anew."""
    command = [sys.executable, "-m", "cvm_translator", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    return Finished(done.returncode, done.stdout, done.stderr)


def wait_for(run_dir: Path, program: Program, is_reached: Callable[[dict[str, Any]], bool]) -> None:
    """Return once an event is there for which `is_reached` says yes."""
    tail = EventTail(run_dir / "logs" / "events.jsonl")
    try:
        while program.is_alive():
            if any(is_reached(event) for event in tail.poll()):
                return
            time.sleep(0.01)
        raise AssertionError(f"ended before that: {program.finish()}")
    finally:
        tail.close()


@pytest.fixture(scope="session")
def find_event_problems() -> Callable[[list[dict[str, Any]]], list[str]]:
    """What in a run's events is not as their schema says."""
    validator = Draft202012Validator(load_event_schema())

    def find(events: list[dict[str, Any]]) -> list[str]:
        return [f"{event['kind']}: {error.message}" for event in events for error in validator.iter_errors(event)]

    return find


@pytest.fixture(scope="session")
def await_event() -> Callable[..., None]:
    return wait_for


@pytest.fixture(scope="session")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Numbers]:
    """The task; whatever process a test left running is ended with the session."""
    folder = tmp_path_factory.mktemp("numbers")
    task = Numbers(folder, folder / "teachers")
    yield task
    for program in task.programs:
        if program.is_alive():
            program.send(signal.SIGKILL)


@dataclasses.dataclass(frozen=True)
class Run:
    """A run folder and what the process that made it said."""

    config: Path
    folder: Path
    finished: Finished

    @property
    def events(self) -> list[dict[str, Any]]:
        return list(read_events(self.folder / "logs" / "events.jsonl"))

    def kind(self, *kinds: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["kind"] in kinds]

    def read_json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def whole_run(numbers: Numbers) -> Run:
    """One uninterrupted run of the whole pipeline, by the real command: the reference of everything else."""
    config, folder = numbers.write_config("whole"), numbers.folder / "whole_run"
    return Run(config, folder, run_real(numbers.folder, "run", config, "--output-dir", folder, "--no-progress"))
