"""What a user can get wrong, through the real command: exit code 1, one `error:` line, and nothing made is lost."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cvm_translator.checkpoints import CheckpointStore, verify_checkpoint
from cvm_translator.config import load_config
from cvm_translator.pipeline.preflight import needed_disk_bytes
from cvm_translator.runs.events import read_events
from cvm_translator.runs.lock import RunLock

pytestmark = pytest.mark.timeout(600)  # the reference run may still have to be made


def assert_one_line(end: Any, words: str) -> None:
    assert end.exit_code == 1
    assert end.output == ""
    (line,) = end.errors.splitlines()
    assert line.startswith("error: ")
    assert re.search(words, line), line


# ------------------------------------------------------------------------------------------------ config and corpus


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["distillation.temprature=2"],
            r"unknown setting distillation\.temprature: did you mean distillation\.temperature\?",
        ),
        (["guard.confidence=2"], r"guard\.confidence: .* \(got 2\)"),
        (["corpus.train=[{format: tsv, path: /nowhere/a.tsv}]"], r"/nowhere/a\.tsv"),
        (["corpus.train=[{format: tsv, path: empty.tsv}]"], r"empty"),
        (["corpus.train=[{format: tsv, path: no_tabs.tsv}]"], r"malformed.*quarantine"),
        (["corpus.train=[{format: tsv, path: latin.tsv}]"], r"malformed.*quarantine"),
        (["corpus.test_size=90000"], r"test_size 90000 cannot be held out of 2500 clean training pairs"),
        (["tokenizer.vocab_size=9000"], r"tokenizer\.vocab_size 9000 is more than this corpus allows"),
        (["teacher.kind=checkpoint", "teacher.path=no_model"], r"no_model"),
        (["validation.metrics=[bleu, chrf, comet]"], r"metrics names comet.*pip install 'cvm-translator\[comet\]'"),
        (["device=cuda:99"], r"device cuda:99: this machine offers \d+ CUDA devices"),
    ],
)
def test_a_run_that_cannot_begin(overrides: list[str], words: str, numbers: Any, tmp_path: Path) -> None:
    config = numbers.write_config("bad")
    (numbers.folder / "empty.tsv").write_text("")
    (numbers.folder / "no_tabs.tsv").write_text("eins one\n" * 50)
    (numbers.folder / "latin.tsv").write_bytes("fünf\tfive\n".encode("latin-1") * 50)
    (numbers.folder / "no_model").mkdir(exist_ok=True)
    overrides = [o.replace("path: e", f"path: {numbers.folder}/e") for o in overrides]
    for name in ("no_tabs.tsv", "latin.tsv"):
        overrides = [o.replace(f"path: {name}", f"path: {numbers.folder / name}") for o in overrides]
    more = [part for override in overrides for part in ("--set", override)]
    run_dir = tmp_path / "run"
    assert_one_line(numbers.start_run(config, run_dir, *more).finish(), words)
    events = list(read_events(run_dir / "logs" / "events.jsonl"))
    assert not events or events[-1]["kind"] == "failed"


def test_a_mended_config_may_go_on_in_its_folder(numbers: Any, tmp_path: Path) -> None:
    """Until something is trained, a start that failed for a setting does not claim the folder."""
    config = numbers.write_config("mended")
    too_many = numbers.start_run(config, tmp_path / "run", "--set", "tokenizer.vocab_size=9000").finish()
    assert_one_line(too_many, "vocab_size 9000")
    again = numbers.start_run(config, tmp_path / "run", "--set", "device=cuda:99").finish()
    assert_one_line(again, "device cuda:99")


# ------------------------------------------------------------------------------------------------------- run folders


def test_a_folder_of_another_config_is_refused_and_untouched(numbers: Any, whole_run: Any) -> None:
    kept = (whole_run.folder / "config.yaml").read_bytes()
    end = numbers.start_run(whole_run.config, whole_run.folder, "--set", "distillation.alpha=0.5").finish()
    assert_one_line(end, r"another config \(distillation\.alpha: was 0\.8, is 0\.5\): choose another --output-dir")
    assert (whole_run.folder / "config.yaml").read_bytes() == kept
    assert whole_run.events[-1]["kind"] == "run_finished"


def test_a_folder_in_use_is_refused(numbers: Any, whole_run: Any) -> None:
    with RunLock(whole_run.folder / "run.lock"):
        end = numbers.start_run(whole_run.config, whole_run.folder).finish()
    assert_one_line(end, rf"{whole_run.folder} is in use by process {os.getpid()} on .*: stop it with")


def test_a_corpus_that_changed_under_its_run_is_refused(numbers: Any, whole_run: Any, tmp_path: Path) -> None:
    config = numbers.write_config("changed", corpus={"train": [{"format": "tsv", "path": str(tmp_path / "own.tsv")}]})
    shutil.copyfile(numbers.folder / "numbers.tsv", tmp_path / "own.tsv")
    end = numbers.start_run(config, tmp_path / "run", "--set", "tokenizer.vocab_size=9000").finish()
    assert_one_line(end, "vocab_size")
    with open(tmp_path / "own.tsv", "a", encoding="utf-8") as stream:
        stream.write("zwölf\ttwelve\n")
    assert_one_line(numbers.start_run(config, tmp_path / "run").finish(), r"own\.tsv.*changed")


def test_a_run_with_no_valid_checkpoint_left_is_told_so(numbers: Any, whole_run: Any, tmp_path: Path) -> None:
    """Every checkpoint of the student is damaged: nothing is trained over in silence."""
    folder = tmp_path / "copy"
    shutil.copytree(whole_run.folder, folder, symlinks=True)
    for path in (folder / "checkpoints").glob("checkpoint_*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    end = numbers.start_run(whole_run.config, folder).finish()
    assert end.exit_code == 1
    assert len(end.error_lines) == 1
    assert re.search(r"none of the \d checkpoints in .* is valid .*restore one from a backup", end.error_lines[0])
    assert "Traceback" not in end.errors


@pytest.mark.parametrize("command", [["translate", "--model"], ["validate"]])
def test_a_folder_that_is_no_model(command: list[str], numbers: Any, tmp_path: Path) -> None:
    assert_one_line(numbers.run(*command, tmp_path), re.escape(str(tmp_path)))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["teacher.path=no_model"], r"no_model is no model folder: it has no config\.json$"),
        (["teacher.path=teacher/model", "corpus.source_language=fr"], r"translates de to en, the corpus is fr to en"),
        (["teacher.path=student", "student.init=teacher_layers"], r"student/int8 is int8, whose layers cannot be cop"),
        (
            ["teacher.path=teacher/model", "student.init=teacher_layers", "student.model.feed_forward_dim=64"],
            r"the student's feed_forward_dim is 64, the teacher's 128",
        ),
    ],
)
def test_a_teacher_that_cannot_serve_is_refused_before_anything_is_read(
    overrides: list[str], words: str, numbers: Any, whole_run: Any, tmp_path: Path
) -> None:
    (whole_run.folder / "no_model").mkdir(exist_ok=True)
    overrides = [o.replace("teacher.path=", f"teacher.path={whole_run.folder}/") for o in overrides]
    more = [part for override in ["teacher.kind=checkpoint", *overrides] for part in ("--set", override)]
    assert_one_line(numbers.start_run(numbers.write_config("given"), tmp_path / "run", *more).finish(), words)
    assert not (tmp_path / "run" / "corpus").exists()


def test_a_damaged_config_of_a_run_folder_is_named(numbers: Any, whole_run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole_run.folder, folder, symlinks=True)
    (folder / "config.yaml").write_text(": : [")
    end = numbers.start_run(whole_run.config, folder).finish()
    assert_one_line(end, r"run/config\.yaml cannot be read as YAML .* restore it, or delete it")


def test_text_that_no_model_can_hold_is_refused(numbers: Any, tmp_path: Path) -> None:
    config, generator = numbers.write_config("long"), random.Random(3)
    sides = [" ".join("".join(generator.choices("abcdefgh", k=6)) for _ in range(9)) for _ in range(800)]
    rows = [f"{source}\t{target}\n" for source, target in zip(sides[::2], sides[1::2], strict=True)]
    (numbers.folder / "long.tsv").write_text("".join(rows))
    source = f"corpus.train=[{{format: tsv, path: {numbers.folder}/long.tsv}}]"
    more = ["--set", source, "--set", "teacher.model.max_length=8", "--set", "tokenizer.vocab_size=300"]
    more += ["--set", "corpus.validation_size=5", "--set", "corpus.test_size=5"]
    end = numbers.start_run(config, tmp_path / "run", *more).finish()
    assert_one_line(end, r"all \d+ training pairs are longer than max_length 8 .*: raise")


# ---------------------------------------------------------------------------------------------------------- full disk


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A file system of its own, of a given size; skips where this process may not make one."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system can only be mounted by root")
    try:
        yield
    finally:
        # Lazily: what a killed run had begun to measure may still hold a file there.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Leave no free byte."""
    with open(folder / "ballast", "ab", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(b"\0" * (1 << 16))


def test_too_little_room_is_told_before_the_first_step(numbers: Any, tmp_path: Path) -> None:
    config = numbers.write_config("small_disk")
    with small_disk(tmp_path / "disk", 24):
        end = numbers.start_run(config, tmp_path / "disk" / "run").finish()
        assert_one_line(end, r"the run needs about \d+ MiB and \d+ MiB are free: make room or choose another folder")
        assert not any(e["kind"] == "train" for e in read_events(tmp_path / "disk/run/logs/events.jsonl"))


def test_a_disk_that_fills_up_loses_no_checkpoint(
    numbers: Any, whole_run: Any, await_event: Callable[..., None], tmp_path: Path
) -> None:
    """The run pauses and says so; with room again it goes on by itself, and every loss is the uninterrupted run's."""
    disk = tmp_path / "disk"
    with small_disk(disk, 96):
        program = numbers.start_run(whole_run.config, disk / "run")
        await_event(
            disk / "run", program, lambda e: e["kind"] == "checkpoint" and e["stage"] == "distil" and e["step"] >= 10
        )
        fill(disk)
        deadline = time.monotonic() + 60
        told = "pauses until there is room"
        while told not in program.errors_so_far() and told not in (disk / "run/logs/train.log").read_text():
            assert program.is_alive()
            assert time.monotonic() < deadline
            fill(disk)  # also what a failed save gave back
            time.sleep(0.02)
        store = disk / "run" / "checkpoints"
        names = CheckpointStore(store, report=print).names()
        assert names
        for name in names:
            verify_checkpoint(store / name)
        (disk / "ballast").unlink()
        await_event(disk / "run", program, lambda e: e["kind"] == "stage_finished" and e["stage"] == "quantise")
        program.kill()
        told = {
            (e["stage"], e["executed_step"], e["loss"])
            for e in read_events(disk / "run/logs/events.jsonl")
            if e["kind"] == "train"
        }
        assert told == {(e["stage"], e["executed_step"], e["loss"]) for e in whole_run.kind("train")}
        weights = "student/float/model.safetensors"
        assert (disk / "run" / weights).read_bytes() == (whole_run.folder / weights).read_bytes()


def test_the_room_that_is_asked_for_covers_what_is_written(whole_run: Any) -> None:
    config = load_config(whole_run.folder / "config.yaml")
    written = sum(p.stat().st_size for p in (whole_run.folder / "checkpoints").rglob("*") if p.is_file())
    parameters = whole_run.read_json("reports/final_report.json")["models"]["float"]["num_parameters"]
    assert written < needed_disk_bytes(parameters, config.keep_checkpoints, has_average=True)
