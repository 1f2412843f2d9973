"""Quantising a real student after the fact: judged from its files, refused where it loses too much, or cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cvm_translator.corpus.build import load_split
from cvm_translator.models.decoding import translate_texts
from cvm_translator.models.folder import load_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

METHODS = [
    ("int8", ["--method", "dynamic"]),
    ("int8_static", ["--method", "static"]),
    ("int8_weights", ["--method", "weight_only", "--bits", "8"]),
    ("int4", ["--method", "weight_only", "--bits", "4", "--group-size", "32"]),
    ("int4_row", ["--method", "weight_only", "--bits", "4", "--group-size", "row", "--asymmetric"]),
    ("float16", ["--method", "weight_only", "--bits", "16"]),
    ("mixed", ["--method", "mixed", "--target-ratio", "4.5"]),
]


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_each_method_is_judged_as_deployed(
    name: str, options: list[str], whole_run: Any, numbers: Any, tmp_path: Path
) -> None:
    output = tmp_path / name
    done = numbers.run("quantize", "--model", whole_run.folder / "student", "--output", output, *options)
    assert (done.exit_code, done.errors.count("error")) == (0, 0)
    lines = done.output.splitlines()
    assert lines[0].split()[:1] == ["float32"] and lines[-1] == str(output)
    assert [line.split()[0] for line in lines[1:4]] == ["BLEU", "chrF", "TER"]
    loaded = load_model(output)
    source = load_model(whole_run.folder / "student" / "float")
    assert loaded.model.num_parameters() == source.model.num_parameters()
    assert (output / "model.safetensors").stat().st_size < 0.6 * source.config["files"]["model.safetensors"][
        "num_bytes"
    ]
    assert loaded.config["metadata"]["quantization"]["method"] == options[1]
    assert not list(tmp_path.glob(".*"))


def test_a_plan_is_read_edited_and_used_again(whole_run: Any, numbers: Any, tmp_path: Path) -> None:
    model = whole_run.folder / "student"
    numbers.run("quantize", "--model", model, "--output", tmp_path / "a", "--method", "mixed", "--target-ratio", "4.5")
    path = tmp_path / "a" / "quantization_plan.yaml"
    plan = yaml.safe_load(path.read_text())
    name = next(iter(plan["plan"]))
    plan["plan"][name] = {"kind": "float32"}
    edited = tmp_path / "edited.yaml"
    edited.write_text(yaml.safe_dump(plan))
    done = numbers.run("quantize", "--model", model, "--output", tmp_path / "b", "--method", "mixed", "--plan", edited)
    assert done.exit_code == 0, done.errors
    sizes = [(tmp_path / folder / "model.safetensors").stat().st_size for folder in "ab"]
    assert sizes[1] > sizes[0]


def test_one_that_loses_too_much_is_not_written(whole_run: Any, numbers: Any, tmp_path: Path) -> None:
    """Judged by the float student's own translations, so that every change is a loss."""
    loaded = load_model(whole_run.folder / "student" / "float")
    sources = [pair.source for pair in load_split(whole_run.folder / "corpus", "validation")]
    translations = translate_texts(loaded.model, loaded.tokenizer, sources)
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("".join(f"{s}\t{t}\n" for s, t in zip(sources, translations, strict=True)), encoding="utf-8")
    options = ["--method", "weight_only", "--bits", "4", "--group-size", "row", "--pairs", pairs, "--max-drop", "0"]
    done = numbers.run("quantize", "--model", whole_run.folder / "student", "--output", tmp_path / "out", *options)
    assert done.exit_code == 1
    (line,) = done.error_lines
    assert "BLEU falls by" in line and "nothing was written" in line
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.tsv"]


def test_a_quantised_model_and_an_existing_folder_are_refused(whole_run: Any, numbers: Any, tmp_path: Path) -> None:
    student = whole_run.folder / "student"
    again = numbers.run("quantize", "--model", student / "int8", "--output", tmp_path / "out")
    assert again.exit_code == 1 and "already" in again.error_lines[0]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    done = numbers.run("quantize", "--model", student, "--output", tmp_path / "mine")
    assert done.exit_code == 1 and "exists already" in done.error_lines[0]
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def test_widths_fall_during_a_real_run(whole_run: Any, numbers: Any) -> None:
    """16, 8 and 4 bits, each validated as deployed; the narrowest is delivered and gated."""
    config = numbers.write_config(
        "progressive",
        teacher={"kind": "checkpoint", "path": str(whole_run.folder / "teacher" / "model")},
        student={"init": "teacher_layers"},
        quantization={"method": "progressive", "bits": 4, "start_fraction": 0.0, "group_size": 32},
    )
    folder = numbers.folder / "progressive_run"
    done = numbers.start_run(config, folder).finish()
    assert done.exit_code in (0, 5), done.errors
    events = [json.loads(line) for line in (folder / "logs" / "events.jsonl").read_text().splitlines()]
    bits = [event["bits"] for event in events if event["kind"] == "verdict" and event["stage"] == "distil"]
    assert bits[:2] == [16, 8] and bits == sorted(bits, reverse=True)
    report = json.loads((folder / "reports" / "final_report.json").read_text())
    delivered = report["deployed"]
    assert delivered in ("int8", "int4") and (folder / "student" / delivered / "model.safetensors").exists()
    assert report["models"][delivered]["num_bytes"] < report["models"]["float"]["num_bytes"] / 3


@pytest.mark.parametrize(
    ("quantization", "deployed"),
    [
        ({"method": "mixed", "target_compression_ratio": 4.5}, "mixed"),
        ({"method": "static"}, "int8"),
        ({"method": "qat", "bits": 4}, "int4"),
        ({"method": "weight_only", "bits": 4}, "int4"),
    ],
)
def test_a_short_run_delivers_each_format(
    quantization: dict[str, Any], deployed: str, whole_run: Any, numbers: Any
) -> None:
    config = numbers.write_config(
        f"short_{quantization['method']}",
        teacher={"kind": "checkpoint", "path": str(whole_run.folder / "teacher" / "model")},
        student={"init": "teacher_layers"},
        distillation={"num_iterations": 20, "warmup_steps": 5},
        validation={"every_steps": 20},
        quantization={"bits": 8, "start_fraction": 0.0} | quantization,
    )
    folder = numbers.folder / f"run_{deployed}_{quantization['method']}"
    done = numbers.start_run(config, folder).finish()
    assert done.exit_code in (0, 5), done.errors
    report = json.loads((folder / "reports" / "final_report.json").read_text())
    assert report["deployed"] == deployed
    loaded = load_model(folder / "student")
    assert loaded.config["number_format"] == ("int8_static" if quantization["method"] == "static" else deployed)
    assert report["models"][deployed]["num_bytes"] < report["models"]["float"]["num_bytes"] / 2
    assert (folder / "student" / "quantization_plan.yaml").exists() == (deployed == "mixed")
