"""`--format safetensors`, and exports of a run's quantised student, which the float one beside it is the measure of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cvm_translator.cli import main
from cvm_translator.errors import ModelError
from cvm_translator.models.folder import load_model, save_model
from cvm_translator.pipeline.export import ExportRequest, export_model, exporter
from cvm_translator.pipeline.places import find_float_beside
from cvm_translator.quantization import LayerFormat, convert_with_plan, find_plan

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

KINDS = ["float32", "float16", "int8", "int8_static", "int8_weights", "int4", "mixed"]
LANGUAGES = {"source_language": "de", "target_language": "en"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_format_is_copied_without_references(
    kind: str, exports: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(exports.student / "float")
    plan = dict.fromkeys(find_plan(loaded.model), LayerFormat("int8" if kind == "mixed" else kind))
    if kind == "mixed":
        plan[next(iter(plan))] = LayerFormat("int4", 32)
    ids = torch.arange(4, 40)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    converted = convert_with_plan(loaded.model, plan, lambda model: model(ids, mask, ids))
    original, copy = tmp_path / "original", tmp_path / "copy"
    save_model(original, converted, loaded.tokenizer, **LANGUAGES)
    assert main(["export", "--model", str(original), "--format", "safetensors", "--output", str(copy)]) == 0
    assert (
        f"verified   100.0% of 90 sentences (built-in sentences) translated as by the {kind}" in capsys.readouterr().out
    )
    assert (copy / "model.safetensors").read_bytes() == (original / "model.safetensors").read_bytes()
    facts = json.loads((copy / "cvm_translator.json").read_text())
    assert (facts["format"], facts["number_format"], facts["verification"]["agreement"]) == ("safetensors", kind, 1.0)
    assert "cvm-translator translate --model ." in (copy / "README.md").read_text()


@pytest.mark.parametrize("format_name", ["safetensors", "ctranslate2"])
def test_a_run_s_quantised_student_is_scored_against_the_float_one(
    format_name: str, whole_run: Any, exports: Any, tmp_path: Path
) -> None:
    """On all sentences of the validation set."""
    lines: list[str] = []
    request = ExportRequest(exports.student / "int8", format_name, tmp_path / "out", max_drop=50.0)
    export_model(request, lines.append)
    assert sum(line.endswith("against the float32 model") for line in lines) == 2
    found = json.loads((tmp_path / "out" / "cvm_translator.json").read_text())["verification"]
    assert found["num_sentences"] == (whole_run.folder / "corpus" / "validation.tsv").read_text().count("\n")
    assert found["scored_against"] == "float32 model" and "int8 model natively" in found["compared_with"]


def test_which_float_model_lies_beside(exports: Any, tmp_path: Path) -> None:
    assert find_float_beside(exports.student / "int8") == exports.student / "float"
    assert find_float_beside(exports.student.parent / "teacher" / "model") is None
    assert find_float_beside(tmp_path / "int8") is None


def test_a_copy_that_is_none_is_not_written(exports: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = exporter.FORMATS["safetensors"].write

    def spoil(folder: Path, job: exporter.Job) -> None:
        job.model.encoder_layers[0].attention.qkv.weight.clamp_(-20, 20)
        write(folder, job)

    monkeypatch.setitem(exporter.FORMATS, "safetensors", exporter.Format(("int8",), (), spoil, "native"))
    with pytest.raises(ModelError, match=r"the copy translates only \d+ of 100 sentences as its original does"):
        export_model(ExportRequest(exports.student / "int8", "safetensors", tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_copy_may_lose_anything_unless_a_limit_is_set(
    exports: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scored by the float student's own translations, so that every change is a loss."""
    sources, _ = exports.read_rows()
    pairs = tmp_path / "pairs.tsv"
    rows = zip(sources, exports.load_native("float32").translate(sources, batch_size=32), strict=True)
    pairs.write_text("".join(f"{source}\t{text}\n" for source, text in rows), encoding="utf-8")
    model, copy = exports.student / "int8", tmp_path / "copy"
    command = [
        "export",
        "--model",
        str(model),
        "--format",
        "safetensors",
        "--sentences",
        str(pairs),
        "--output",
        str(copy),
    ]
    assert main([*command, "--max-drop", "0"]) == 1
    assert "more than --max-drop 0: nothing was written; allow more" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.tsv"]
    assert main(command) == 0
    assert "BLEU       100.00 -> " in capsys.readouterr().out
