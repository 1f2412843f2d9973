"""The benchmark of .argosmodel packages: what it demands, what it compares, and where the programs run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import argos_export, argos_programs
from cvm_translator.metrics import MetricOptions, build_metrics

CHANGE = {"difference": -0.05, "low": -0.1, "high": 0.0, "p_value": 0.2}


def make_argos(**changes: Any) -> dict[str, Any]:
    systems = (argos_export.NATIVE_INT8, argos_export.ARGOS_INT8)
    return {
        "run": "my_run",
        "num_sentences": 200,
        "num_comparable": 175,
        "num_comparable_int8": 174,
        "num_same": 176,
        "num_comparable_same": 174,
        "versions": {"Argos Translate": ["argostranslate==1.11.0", "CTranslate2==4.8.5", "x @ file:///x.whl"]},
        "bleu": dict.fromkeys(systems, 30.0),
        "bleu_without_underscores": dict.fromkeys(systems, 31.0),
        "compared": {which: {argos_export.ARGOS_INT8: CHANGE} for which in ("all", "comparable")},
    } | changes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0, 0, 0, 0]),
        ({"num_comparable": 99, "num_comparable_same": 99}, [1, 0, 0, 0]),
        ({"num_comparable": 0, "num_comparable_same": 0, "compared": {}}, [1, 1, 1, 1]),
        ({"num_comparable_same": 171}, [0, 1, 0, 0]),
        ({"compared": {"all": {argos_export.ARGOS_INT8: CHANGE | {"difference": -0.4}}}}, [0, 0, 1, 1]),
    ],
)
def test_the_claims_about_argos_packages_can_fail(changes: dict[str, Any], expected: list[int]) -> None:
    data = make_argos(**changes)
    assert [len(found) for found in argos_export.find_failures(data).values()] == expected
    text = argos_export.format_results(data)
    assert "ctranslate2 4.8.5" in text and "torch" not in text


def test_lines_are_comparable_where_argos_has_no_reason_to_differ() -> None:
    texts = ["as it is", "an_underscore", "at its limit", "two. Sentences."]
    assert argos_export.are_comparable(texts, [2, 3, 9, 4], [9, 9, 9, 9], [1, 1, 1, 2]) == [True, False, False, False]


def test_like_is_compared_with_like() -> None:
    ours = ["the first file was not found here", "the second file_name was not found here", "one more line of text"]
    theirs = [ours[0], ours[1].replace("_", " "), "one more line of a text"]
    texts = {
        argos_export.NATIVE_FLOAT: ours,
        argos_export.ARGOS_FLOAT: theirs,
        argos_export.NATIVE_INT8: ours,
        argos_export.ARGOS_INT8: theirs,
    }
    words = argos_export.compare_words(texts, ["eins", "zwei", "drei"], [True, False, True])
    assert [words[key] for key in ("num_comparable", "num_same", "num_comparable_same")] == [2, 1, 1]
    assert [row["source"] for row in words["different"]] == ["drei"]
    (bleu,) = build_metrics(["bleu"], MetricOptions(target_language="en"))
    scores = argos_export.compare_scores(bleu, texts, ours, [True, True, False])
    assert scores["bleu_without_underscores"][argos_export.NATIVE_INT8] == pytest.approx(100.0)
    assert scores["compared"]["comparable"][argos_export.ARGOS_INT8]["difference"] == pytest.approx(0.0)
    assert scores["compared"]["all"][argos_export.ARGOS_INT8]["difference"] < 0
    assert scores["num_comparable_int8"] == 2


def test_programs_see_nothing_of_the_user_and_start_empty(tmp_path: Path) -> None:
    (tmp_path / "argos-translate" / "packages" / "old").mkdir(parents=True)
    user = {"PATH": "/bin", "LT_UPDATE_MODELS": "true", "ARGOS_BEAM_SIZE": "9", "PYTHONPATH": "/x"}
    environment = argos_programs.isolate(tmp_path, argos_programs.GREEDY, user)
    assert environment["ARGOS_BEAM_SIZE"] == "1" and environment["HOME"] == str(tmp_path)
    assert not {"LT_UPDATE_MODELS", "PYTHONPATH"} & set(environment) and environment["PATH"] == "/bin"
    assert not (tmp_path / "argos-translate").exists()


def test_environments_have_the_pinned_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def call(command: list[str]) -> str:
        calls.append(command)
        (tmp_path / "env").mkdir(exist_ok=True)
        return "torch==1.0\n" if command[-1] == "freeze" else ""

    monkeypatch.setattr(argos_programs, "_call", call)
    environment = argos_programs.build_environment(tmp_path / "env", argos_programs.LIBRETRANSLATE)
    pins = argos_programs.read_pins()
    held = (tmp_path / "env" / "constraints.txt").read_text().split()
    assert held == [pins[name] for name in ("torch", "ctranslate2", "sentencepiece")]
    assert pins["ctranslate2"] in calls[1] and "libretranslate==1.9.6" in calls[1]
    assert environment.find_version("Torch") == "1.0" and environment.find_version("numpy") is None
    again = argos_programs.build_environment(tmp_path / "env", argos_programs.LIBRETRANSLATE)
    assert again == environment and len(calls) == 3
    assert json.loads((tmp_path / "env" / "complete.json").read_text())["versions"] == ["torch==1.0"]
