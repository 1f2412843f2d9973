"""Asking a run: the answer is waited for, and there must be somebody to ask."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from cvm_translator.cli import main
from cvm_translator.daemon.requests import ask
from cvm_translator.errors import CvmError
from cvm_translator.runs import control
from cvm_translator.runs.control import ControlFile
from cvm_translator.runs.events import EventWriter
from cvm_translator.runs.layout import RunLayout
from cvm_translator.runs.lock import RunLock


def answer(layout: RunLayout, result: str, ready: threading.Event) -> None:
    """Hold the run and answer one request, as a trainer would."""
    reader = ControlFile(layout.control)
    with RunLock(layout.lock), EventWriter(layout.events) as events:
        ready.set()
        while not (requests := list(reader.poll())):
            time.sleep(0.01)
        events.write("control", id="another", action="pause", result="done", message="of somebody else")
        for request in requests:
            events.write("control", id=request.id, action=request.action, result=result, message="after step 7")


@pytest.mark.parametrize(("result", "exit_code"), [("done", 0), ("failed", 1)])
def test_the_answer_is_waited_for(
    result: str, exit_code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "LOOK_EVERY_SECONDS", 0.01)
    ready = threading.Event()
    thread = threading.Thread(target=answer, args=(RunLayout(tmp_path), result, ready))
    thread.start()
    assert ready.wait(30)
    assert main(["control", "pause", str(tmp_path)]) == exit_code
    thread.join()
    captured = capsys.readouterr()
    assert "after step 7" in (captured.out if exit_code == 0 else captured.err)


def test_nobody_to_ask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["control", "validate", str(tmp_path)]) == 3
    assert capsys.readouterr().err == f"error: no run holds {tmp_path}: there is nobody to ask\n"
    assert list(tmp_path.iterdir()) == []


def test_no_answer_in_time(tmp_path: Path) -> None:
    with (
        RunLock(RunLayout(tmp_path).lock),
        pytest.raises(CvmError, match=r"no answer to checkpoint .* stays asked for"),
    ):
        ask(tmp_path, "checkpoint", 0.1)


def test_an_unknown_action_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["control", "explode", str(tmp_path)])
    assert "choose from 'pause', 'continue'" in capsys.readouterr().err
