"""A whole run: what lies where, what the events tell, what the report says, and that a rerun does nothing again."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from cvm_translator.checkpoints import verify_checkpoint
from cvm_translator.config import load_config
from cvm_translator.models.folder import load_model
from cvm_translator.pipeline import ModelDistiller

# The first test to ask for the reference run waits for it; so do those beside it on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STAGES = ["corpus", "tokenizer", "teacher", "distil", "quantise", "gate", "report"]


def hashes(folder: Path) -> dict[str, str]:
    """Of every file but the logs and the lock, which each start writes."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.relative_to(folder).parts[0] not in ("logs", "run.lock", "tensorboard")
    }


def test_it_ends_well_and_says_no_more_than_its_verdict(whole_run: Any) -> None:
    assert (whole_run.finished.exit_code, whole_run.finished.errors) == (0, "")
    (line,) = whole_run.finished.output.splitlines()
    assert re.match(r"gate passed; test set: teacher BLEU [\d.]+, int8 student [\d.]+ \([\d.]+%\); quality", line)


def test_the_teacher_is_worth_copying_and_the_gate_passed(whole_run: Any) -> None:
    report = whole_run.read_json("reports/final_report.json")
    assert report["test"]["teacher"]["scores"]["bleu"]["value"] > 50
    assert report["gate"]["passed"]
    assert report["models"]["int8"]["num_bytes"] < report["models"]["float"]["num_bytes"] / 2


@pytest.mark.parametrize(
    "name",
    [
        *("config.yaml", "environment.json", "run.lock", "logs/train.log", "logs/events.jsonl"),
        *("corpus/train.tsv", "corpus/validation.tsv", "corpus/test.tsv", "corpus/unseen.tsv", "corpus/manifest.json"),
        *("corpus/filters.json", "corpus/quarantine.tsv", "tokenizer/sentencepiece.model", "tokenizer/manifest.json"),
        *("teacher/model/model.safetensors", "teacher/checkpoints/best_model", "teacher/validation/step_120.json"),
        *("checkpoints/best_model", "checkpoints/latest", "checkpoints/checkpoint_160"),
        *("validation/step_40.json", "validation/step_160.hypotheses.txt", "validation/teacher.json"),
        *("validation/teacher.hypotheses.txt", "validation/best_model_validation_report.txt"),
        *("student/float/model.safetensors", "student/int8/model.safetensors", "student/int8/sentencepiece.model"),
        *("student/metadata.json", "student/README.md", "reports/final_report.json"),
        *("reports/comparison_report.md", "reports/comparison_report.html", "reports/plots", "tensorboard"),
    ],
)
def test_the_run_folder_holds(name: str, whole_run: Any) -> None:
    path = whole_run.folder / name
    assert path.exists()
    assert path.name == "run.lock" or path.name in ("quarantine.tsv", "unseen.tsv") or path.stat().st_size > 0


def test_nothing_temporary_stays(whole_run: Any) -> None:
    assert [path.name for path in whole_run.folder.rglob(".*")] == [".lock"]  # of reports/
    assert not (whole_run.folder / "teacher" / "states").exists()


def test_events_tell_the_whole_run(whole_run: Any, find_event_problems: Any) -> None:
    events = whole_run.events
    assert find_event_problems(events) == []
    assert (events[0]["kind"], events[-1]["kind"]) == ("run_started", "run_finished")
    assert events[0]["stages"] == STAGES
    assert events[0]["config_sha256"] == hashlib.sha256((whole_run.folder / "config.yaml").read_bytes()).hexdigest()
    for kind in ("stage_started", "stage_finished"):
        assert [event["stage"] for event in whole_run.kind(kind)] == STAGES
    assert not any(event["skipped"] for event in whole_run.kind("stage_finished"))
    assert whole_run.kind("failed", "stopped", "resumed", "rollback") == []
    finished = events[-1]
    assert (finished["exit_code"], finished["gate_passed"], finished["halted"]) == (0, True, False)
    assert finished["executed_steps"] == 160


@pytest.mark.parametrize(("stage", "num_iterations", "every"), [("teacher", 120, 60), ("distil", 160, 40)])
def test_exactly_the_steps_asked_for(stage: str, num_iterations: int, every: int, whole_run: Any) -> None:
    train = [event for event in whole_run.kind("train") if event["stage"] == stage]
    assert [event["step"] for event in train] == list(range(1, num_iterations + 1))
    assert [event["executed_step"] for event in train] == list(range(1, num_iterations + 1))
    assert train[-1]["loss"] < train[0]["loss"] / 2
    validated = list(range(every, num_iterations + 1, every))
    for kind in ("validation", "verdict"):
        assert [event["step"] for event in whole_run.kind(kind) if event["stage"] == stage] == validated
    folder = whole_run.folder / ("teacher/validation" if stage == "teacher" else "validation")
    assert sorted(folder.glob("step_*.json")) == sorted(folder / f"step_{step}.json" for step in validated)


def test_validations_score_the_output_against_the_teacher(whole_run: Any) -> None:
    for event in (event for event in whole_run.kind("validation") if event["stage"] == "distil"):
        record = whole_run.read_json(f"validation/step_{event['step']}.json")
        hypotheses = (whole_run.folder / f"validation/step_{event['step']}.hypotheses.txt").read_text()
        assert len(hypotheses.splitlines()) == record["num_sentences"] == 100
        assert event["scores"]["bleu"] == record["scores"]["bleu"]
        teacher = whole_run.read_json("validation/teacher.json")
        assert event["teacher_scores"] == teacher["scores"] | teacher["extra"]
        assert event["retentions"]["bleu"] == pytest.approx(event["scores"]["bleu"] / event["teacher_scores"]["bleu"])
        compared = record["comparisons"]["teacher"]["extra"]["perplexity"]
        assert compared["score"] == event["scores"]["perplexity"] > 1.0
        assert compared["other_score"] == event["teacher_scores"]["perplexity"] > 1.0
    assert record["comparisons"]["previous"]["extra"]["perplexity"]["difference"] != 0.0
    assert event["quality_score"] > 0.9


def test_checkpoints_are_whole_and_the_best_is_the_one_delivered(whole_run: Any) -> None:
    for store, last in (("checkpoints", 160), ("teacher/checkpoints", 120)):
        folders = [path for path in (whole_run.folder / store).iterdir() if path.name.startswith("checkpoint_")]
        assert folders
        for path in folders:
            verify_checkpoint(path)
        assert (whole_run.folder / store / "latest").readlink() == Path(f"checkpoint_{last}")
    report = whole_run.read_json("reports/final_report.json")
    assert (whole_run.folder / "checkpoints/best_model").readlink() == Path(f"checkpoint_{report['best_step']}")
    quality = {e["step"]: e["quality_score"] for e in whole_run.kind("validation") if e["stage"] == "distil"}
    assert report["best_step"] == max(quality, key=lambda step: quality[step])


def test_the_final_report(whole_run: Any) -> None:
    report = whole_run.read_json("reports/final_report.json")
    assert (report["num_iterations"], report["executed_steps"], report["num_skipped"]) == (160, 160, 0)
    assert (report["halted"], report["halt_reason"], report["rollbacks"]) == (False, None, [])
    assert report["gate"]["thresholds"] == {"quality_score": 0.9, "bleu": 0.9, "chrf": 0.9}
    assert report["corpus"]["test"] == report["corpus"]["validation"] == 100
    assert set(report["models"]) == {"teacher", "float", "int8"}
    assert set(report["gaps"]) == {"teacher_to_float", "float_to_int8"}
    assert set(report["seconds"]) == set(STAGES) - {"report"}
    assert len(report["samples"]) == len(report["worst"]) == 12
    for model in report["models"]:
        perplexity = report["test"][model]["scores"]["perplexity"]
        assert 1.0 < perplexity["low"] < perplexity["value"] < perplexity["high"]
    markdown = (whole_run.folder / "reports" / "comparison_report.md").read_text(encoding="utf-8")
    (row,) = [line for line in markdown.splitlines() if line.startswith("| Perplexity")]
    assert len(re.findall(r"\d+\.\d+", row)) == 3 * len(report["models"])
    assert report["preflight"]["smallest_detectable_drop"] > 0.05
    metadata = whole_run.read_json("student/metadata.json")
    assert json.dumps(metadata)
    for name in ("float", "int8"):
        loaded = load_model(whole_run.folder / "student" / name)
        assert loaded.config["number_format"] == {"float": "float32", "int8": "int8"}[name]


def test_the_folder_keeps_the_config_it_was_made_from(whole_run: Any) -> None:
    kept = yaml.safe_load((whole_run.folder / "config.yaml").read_text())
    assert kept == load_config(whole_run.config, None, whole_run.folder).to_plain()
    log = (whole_run.folder / "logs/train.log").read_text()
    assert "stage distil: done" in log
    assert "distil validation at step 160: bleu" in log
    assert "run finished: gate passed" in log


def test_a_rerun_skips_everything_and_gives_the_same_report(whole_run: Any, tmp_path: Path) -> None:
    """Through the public class, in this process, on a copy of the folder."""
    folder = tmp_path / "copy"
    shutil.copytree(whole_run.folder, folder, symlinks=True)
    before, num_events = hashes(folder), len(whole_run.events)
    report = ModelDistiller(load_config(whole_run.config, None, folder)).run_distillation()
    expected = whole_run.read_json("reports/final_report.json")
    assert report == expected | {"exit_code": 0}
    after = hashes(folder)
    assert {name for name in before | after if before.get(name) != after.get(name)} <= {
        "environment.json",
        "config.yaml",
    }
    new = [json.loads(line) for line in (folder / "logs/events.jsonl").read_text().splitlines()[num_events:]]
    assert [event["stage"] for event in new if event["kind"] == "stage_finished"] == STAGES
    assert all(event["skipped"] for event in new if event["kind"] == "stage_finished")
    assert [event for event in new if event["kind"] in ("train", "validation", "checkpoint")] == []


def test_a_lost_deliverable_is_made_again(whole_run: Any, tmp_path: Path) -> None:
    """Only the stage whose output is gone runs again, and its output is what it was."""
    folder = tmp_path / "copy"
    shutil.copytree(whole_run.folder, folder, symlinks=True)
    weights = folder / "student/int8/model.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    ModelDistiller(load_config(whole_run.config, None, folder)).run_distillation()
    assert weights.read_bytes() == before
    last = {}
    for line in (folder / "logs/events.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["kind"] == "stage_finished":
            last[event["stage"]] = event["skipped"]
    assert last == {stage: stage != "quantise" for stage in STAGES}
