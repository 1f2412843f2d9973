"""The checks of the long forms under benchmarks/reliability/ that need a whole run: each of them can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.reliability import canaries, hangs, hostile_models, hostile_pages, tiny_run


def test_hostile_model_files(tmp_path: Path) -> None:
    options = hostile_models.build_parser().parse_args(["--headers", "20", "--work", str(tmp_path / "work")])
    data = hostile_models.run_benchmark(options)
    assert not any(data["failures"].values())
    assert len(data["cases"]) > 80
    failures: dict[str, list[str]] = {check: [] for check in data["failures"]}
    hostile_models.judge([("config: sound", lambda: None)], failures)
    assert failures[hostile_models.REFUSED] == ["config: sound: loaded"]


def test_every_canary_is_found_in_every_form(tmp_path: Path) -> None:
    assert canaries.check_search(tmp_path / "search") == []
    assert canaries.find_canaries(b"nothing of the kind") == []
    assert canaries.find_canaries(f"x{canaries.TOKENS['key']}x".encode()) == ["key"]


def make_page(**changes: Any) -> dict[str, Any]:
    return {"ran": False, "loaded": [], "pictures": 2, "shown": 2, "has_text": True} | changes


@pytest.mark.parametrize(
    ("changes", "check"),
    [
        ({"ran": True}, hostile_pages.QUIET),
        ({"loaded": ["/x"]}, hostile_pages.QUIET),
        ({"has_text": False}, hostile_pages.QUIET),
        ({"shown": 1}, hostile_pages.PLOTS),
        ({"pictures": 0, "shown": 0}, hostile_pages.PLOTS),
    ],
)
def test_pages_that_act_or_hide_their_plots_are_found(changes: dict[str, Any], check: str) -> None:
    pages = {
        "report": make_page(),
        f"report{hostile_pages.BLIND}": make_page(shown=0),
        hostile_pages.NAKED: make_page(ran=True, loaded=["/x"], shown=0),
    }
    assert not any(hostile_pages.find_failures(pages).values())
    failures = hostile_pages.find_failures(pages | {"report": make_page(**changes)})
    assert [name for name, found in failures.items() if found] == [check]


def test_a_judge_that_sees_nothing_is_found() -> None:
    pages = {
        "report": make_page(),
        f"report{hostile_pages.BLIND}": make_page(),
        hostile_pages.NAKED: make_page(),
    }
    assert len(hostile_pages.find_failures(pages)[hostile_pages.JUDGED]) == 2


def test_the_slowest_step_begins_after_whatever_came_before_it() -> None:
    seconds = {"resumed": "10.0", "train": "10.5", "checkpoint": "17.0"}
    events = [{"kind": kind, "time": f"2026-01-01T00:00:{second}+00:00"} for kind, second in seconds.items()]
    assert hangs.find_slowest_step([*events, {"kind": "train", "time": "2026-01-01T00:00:19+00:00"}]) == 2.0


def test_the_tiny_text_is_a_text() -> None:
    assert (tiny_run.spell(407, "de"), tiny_run.spell(407, "en")) == ("null vier null sieben", "zero four zero seven")
    assert tiny_run.merge({"a": {"b": 1}, "c": 2}, {"a": {"d": 3}}) == {"a": {"b": 1, "d": 3}, "c": 2}
