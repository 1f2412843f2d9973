"""What a run tells on the terminal: the lines, and the display under them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.reliability.hostile_pages import PAYLOADS
from cvm_translator.config.schema import LoggingConfig
from cvm_translator.pipeline.journal import LiveDisplay, PlainDisplay, TextLog, describe_event
from cvm_translator.runs.control import ControlFile, submit
from cvm_translator.runs.events import EventWriter, read_events

SCORES = {"bleu": 30.5, "chrf": 50.25}


def progress(stage: str = "distil", **changes: Any) -> dict[str, Any]:
    event = {"kind": "progress", "stage": stage, "step": 7200, "num_iterations": 10_000, "steps_per_second": 112.34}
    event |= {"tokens_per_second": 9000.0, "eta_seconds": 4321.0}
    return event | {"loss": 1.25, "distillation_loss": 0.8125, "task_loss": 3.5} | changes


def validation(stage: str, quality: float | None) -> dict[str, Any]:
    teacher_scores = SCORES if stage == "distil" else {}
    event = {"kind": "validation", "stage": stage, "step": 1000, "scores": SCORES, "teacher_scores": teacher_scores}
    return event | {"quality_score": quality}


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            progress(),
            "distil step 7200/10000  112.3 steps/s  9000 tokens/s  1:12:01 left"
            "  loss 1.250 (distillation 0.812, task 3.500)",
        ),
        (validation("distil", 0.0), "distil validation at step 1000: bleu 30.50  chrf 50.25  quality 0.000 of the te"),
        (validation("teacher", 0.4), "teacher validation at step 1000: bleu 30.50  chrf 50.25"),
        (
            {"kind": "stage_finished", "stage": "gate", "skipped": False, "seconds": 16.0, "summary": {"passed": True}},
            "stage gate: done in 16.0 s (passed)",
        ),
        (
            {"kind": "stage_finished", "stage": "quantise", "skipped": True, "seconds": 0.1}
            | {"summary": {"float_bytes": 14 << 20, "int8_bytes": 3 << 20}},
            "stage quantise: reused (float 14.0 MiB, int8 3.0 MiB)",
        ),
        (
            {"kind": "stage_finished", "stage": "distil", "skipped": False, "seconds": 2.0}
            | {"summary": {"steps": 10_000, "best_step": None}},
            "stage distil: done in 2.0 s (steps 10,000, best step None)",
        ),
    ],
)
def test_lines(event: dict[str, Any], line: str) -> None:
    assert (describe_event(event) or "").startswith(line)


def test_without_a_teacher_there_is_one_loss() -> None:
    told = describe_event(progress("teacher", distillation_loss=0.0)) or ""
    assert told.endswith("loss 1.250")
    skipped = describe_event(progress(loss=None, distillation_loss=None, task_loss=None)) or ""
    assert skipped.endswith("loss -")


@pytest.fixture
def display() -> Iterator[LiveDisplay]:
    console = Console(file=io.StringIO(), width=80, height=25, force_terminal=True, legacy_windows=False)
    shown = LiveDisplay(console)
    yield shown
    shown.close()


def drawn(display: LiveDisplay) -> list[str]:
    """What stands on an 80-column terminal under the lines."""
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(display._render())
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


def test_step_speed_time_losses_and_quality_fit_80_columns(display: LiveDisplay) -> None:
    display(progress())
    display(validation("distil", 0.9712))
    bar, below = drawn(display)
    assert bar.split()[0] == "distil"
    assert bar.endswith("7,200/10,000 112.3 steps/s  1:12:01 left")
    assert below == "loss 1.250 (distillation 0.812, task 3.500)  quality 0.971 of the teacher's"


def test_nothing_of_the_teachers_training_is_shown_with_the_students(display: LiveDisplay) -> None:
    display(progress("teacher", distillation_loss=0.0))
    display(validation("teacher", 0.9))
    display({"kind": "stage_finished", "stage": "teacher", "skipped": False, "seconds": 1.0, "summary": {}})
    assert drawn(display) == [""]
    display(progress("distil", step=1))
    assert "quality" not in "".join(drawn(display))
    assert drawn(display)[0].startswith("distil")


def test_plain_lines_for_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    plain = PlainDisplay()
    for event in (progress(), progress(), validation("distil", 0.5), {"kind": "train"}):
        plain(event)
    assert len(capsys.readouterr().err.splitlines()) == 2  # progress at most every quarter of a minute


def test_the_log_rotates_by_size_with_that_of_the_background_process_beside_it(tmp_path: Path) -> None:
    (tmp_path / "daemon.log").write_text("x" * 2000)
    log = TextLog(tmp_path / "train.log", LoggingConfig(max_mib=0.001, backups=2))
    for number in range(60):
        log(progress(step=number))
        log({"kind": "train"})
    log.close()
    names = ["daemon.log", "daemon.log.1", "train.log", "train.log.1", "train.log.2"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert all(path.stat().st_size <= 1049 for path in tmp_path.glob("train.log*"))
    assert (tmp_path / "daemon.log").read_text() == "" and "step 59/" in (tmp_path / "train.log").read_text()


# ------------------------------------------------------------------------------------------------------- hostile text

HOSTILE = [
    *PAYLOADS,
    "\x1b[2J\x1b]0;owned\x07",
    "\x9b31m \x90q\x9c \x85",
    "\u202e\u2066\u2069 \u2028 \u200b",
    "\n2026 INFO x",
]


def hostile_events(text: str) -> list[dict[str, Any]]:
    """Wherever text can stand that did not come from the program: the names in a stage's summary, too."""
    common = {"step": 7, "stage": "distil"}
    return [
        {"kind": "stage_started", "stage": text},
        {"kind": "stage_finished", "stage": text, "skipped": False, "seconds": 1.0, "summary": {text: text}},
        progress(text),
        validation(text, 0.9) | {"scores": {text: 1.0}},
        {"kind": "verdict", "verdict": text, "action": text, "reason": text, **common},
        {"kind": "rollback", "rollback_number": 1, "from_step": 9, "to_step": 7, "reason": text, "data_stream": 1,
         "learning_rate_factor": 0.5},
        {"kind": "warning", "message": text},
        {"kind": "resumed", "exact": False, "differences": [text], **common},
        {"kind": "control", "id": "a1", "action": text, "result": "unknown", "message": text},
        {"kind": "paused", "reason": text, **common},
        {"kind": "failed", "message": text},
        {"kind": "stopped", "signal": 15, "reason": text},
    ]  # fmt: skip


def foreign(text: str) -> list[str]:
    return [character for character in text if character != "\n" and not character.isprintable()]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_in_the_log(text: str, tmp_path: Path) -> None:
    """One line an event, and no character that acts on the terminal of whoever reads it."""
    log = TextLog(tmp_path / "train.log")
    for event in hostile_events(text):
        log(event)
    log.note(text)
    log.close()
    shown = (tmp_path / "train.log").read_text(encoding="utf-8")
    assert foreign(shown) == []
    assert len(shown.splitlines()) == len(hostile_events(text)) + 1
    assert all(line.endswith("Z") for line in (line.split(" ")[0] for line in shown.splitlines()))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_on_the_displays(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    plain = PlainDisplay()
    stream = io.StringIO()
    live = LiveDisplay(Console(file=stream, width=120, height=40, force_terminal=True, color_system=None))
    below = ""
    for shown in (plain, live):
        for event in hostile_events(text):
            shown(event)
            below += "\n".join(drawn(live))
        shown.note(text)
    assert foreign(capsys.readouterr().err) == []
    assert foreign(below) == []
    live.close()
    # What is left are the sequences by which the display itself moves the cursor.
    assert foreign(re.sub(r"\x1b\[(?:\?25[lh]|\d*[AK]|2K)|\r", "", stream.getvalue())) == []


def test_a_request_that_nobody_knows_reaches_log_and_events_harmless(tmp_path: Path) -> None:
    """From control.json, which anybody with access to the folder writes, to what the trainer writes of it."""
    action = "\x1b[2J\x9b31m\u202e\x7f"
    submit(tmp_path / "control.json", action)
    (request,) = ControlFile(tmp_path / "control.json").poll()
    assert request.action == action
    with EventWriter(tmp_path / "events.jsonl") as events:
        log = TextLog(tmp_path / "train.log")
        events.listeners.append(log)
        events.write("control", id=request.id, action=request.action, result="unknown", message="known actions are …")
        log.close()
    for name in ("events.jsonl", "train.log"):
        assert foreign((tmp_path / name).read_text(encoding="utf-8")) == []
    (event,) = read_events(tmp_path / "events.jsonl")
    assert event["action"] == action
