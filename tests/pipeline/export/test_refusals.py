"""What cannot be exported is refused in one line, and then nothing is there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from cvm_translator.cli import main
from cvm_translator.errors import CvmError, ModelError
from cvm_translator.models.runtimes import load_runtime
from cvm_translator.pipeline.export import ExportRequest, export_model, exporter

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "huggingface", "--model", "int8"], "is int8: --format huggingface in float32 is made from the"),
        (["--format", "onnx", "--quantization", "float32", "--model", "int8"], "name its folder (in a run: student/fl"),
        (
            ["--format", "huggingface", "--quantization", "int8"],
            "--quantization int8: --format huggingface offers float",
        ),
        (["--format", "safetensors", "--quantization", "float32"], "copies it as it is; for float32 use"),
        (["--format", "onnx", "--vocabulary-map"], "vocabulary maps are for --format ctranslate2, not onnx"),
        (["--format", "ctranslate2", "--corpus", "nowhere"], "--corpus nowhere does not exist: name a run folder"),
        (["--format", "onnx", "--sentences", "empty.txt"], "empty.txt holds no sentences"),
        (["--format", "onnx", "--sentences", "missing.txt"], "missing.txt: No such file or directory"),
        (["--format", "argos", "--model", "nowhere"], "there is no model folder"),
        (["--format", "onnx", "--sentences", "one.txt", "--max-drop", "1"], "--max-drop 1 is judged by references"),
    ],
)
def test_wrong_combinations_are_one_line(
    arguments: list[str],
    words: str,
    exports: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "one.txt").write_text("eins\n")
    model = exports.student
    if "--model" in arguments:
        place = arguments.index("--model")
        model = exports.student / arguments[place + 1]
        arguments = arguments[:place] + arguments[place + 2 :]
    assert main(["export", "--model", str(model), "--output", "out", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ")
    assert words in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.txt", "one.txt"]


def test_a_map_needs_text(exports: Any, tmp_path: Path) -> None:
    from cvm_translator.models.folder import load_model, save_model

    loaded = load_model(exports.student / "float")
    languages = {"source_language": "de", "target_language": "en"}
    save_model(tmp_path / "model", loaded.model, loaded.tokenizer, **languages)
    with pytest.raises(ModelError, match=r"name it with --corpus RUN_DIR or FILE\.tsv"):
        export_model(ExportRequest(tmp_path / "model", "ctranslate2", tmp_path / "out", vocabulary_map=True))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_nothing_is_overwritten(kind: str, exports: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    if kind == "folder":
        output.mkdir()
    elif kind == "file":
        output.write_text("mine")
    else:
        output.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="exists already: remove it or choose another folder"):
        export_model(ExportRequest(exports.student, "onnx", output))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_place_that_cannot_be_written_is_named(
    exports: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    output = tmp_path / "file" / "out"
    assert main(["export", "--model", str(exports.student), "--format", "onnx", "--output", str(output)]) == 1
    assert f"error: {tmp_path / 'file'}: " in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("format_name", "library"),
    [("ctranslate2", "ctranslate2"), ("argos", "onnx"), ("onnx", "onnxruntime"), ("huggingface", "transformers")],
)
def test_a_missing_library_names_its_extra(
    format_name: str, library: str, exports: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(CvmError, match=rf"pip install 'cvm-translator\[{format_name}\]'"):
        export_model(ExportRequest(exports.student, format_name, tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_format_is_refused_with_the_known_ones(exports: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="known are safetensors, huggingface, ctranslate2, argos, onnx"):
        export_model(ExportRequest(exports.student, "gguf", tmp_path / "out"))
    with pytest.raises(ModelError, match="unknown runtime 'gguf': known are native"):
        load_runtime("gguf", tmp_path)


# ------------------------------------------------------------------------------------------------------- bad exports


def test_an_export_that_translates_otherwise_is_not_written(
    exports: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if a writer had left a layer out."""
    write = exporter.FORMATS["ctranslate2"].write

    def spoil(folder: Path, job: exporter.Job) -> None:
        job.model.encoder_layers[0].feed_forward.down.weight.data.zero_()
        write(folder, job)

    form = exporter.Format(("float32", "int8"), ("ctranslate2",), spoil, "ctranslate2")
    monkeypatch.setitem(exporter.FORMATS, "ctranslate2", form)
    with pytest.raises(ModelError, match=r"translates only .* as the native model does .* so it is not written"):
        export_model(ExportRequest(exports.student, "ctranslate2", tmp_path / "out", "float32"))
    assert list(tmp_path.iterdir()) == []


def test_an_int8_export_that_loses_too_much_is_not_written(
    exports: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = exporter.FORMATS["onnx"].write

    def spoil(folder: Path, job: exporter.Job) -> None:
        job.model.encoder_layers[0].attention.qkv.weight.clamp_(-20, 20)
        write(folder, job)

    form = exporter.Format(("int8",), ("onnx", "onnxruntime"), spoil, "onnx")
    monkeypatch.setitem(exporter.FORMATS, "onnx", form)
    request = ExportRequest(exports.student, "onnx", tmp_path / "out", sentences=exports.sentences)
    with pytest.raises(
        ModelError, match=r"BLEU falls by \d+\.\d\d .* more than --max-drop 0\.5: nothing was written; allow"
    ):
        export_model(request)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format_name", ["ctranslate2", "onnx", "huggingface", "argos"])
def test_other_folders_are_no_exports(format_name: str, exports: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no model folder|no \.argosmodel package"):
        load_runtime(format_name, tmp_path / "missing")
    with pytest.raises(ModelError, match=r"is no .* export: it has no cvm_translator\.json|no \.argosmodel package"):
        load_runtime(format_name, exports.student)
    (tmp_path / "cvm_translator.json").write_text(f'{{"format": "{format_name}", "max_length": 9}}')
    with pytest.raises(ModelError, match=r"cannot be loaded by|no \.argosmodel package"):
        load_runtime(format_name, tmp_path)
    (tmp_path / "cvm_translator.json").write_text('{"format": "other", "max_length": 9}')
    with pytest.raises(ModelError, match=r"is a other export|no \.argosmodel package"):
        load_runtime(format_name, tmp_path)


def test_translate_in_another_runtime_keeps_its_lines(
    exports: Any, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    (tmp_path / "in.txt").write_text("zwei\n\n" + "drei " * 200 + "\nvier")
    command = ["translate", "--input", str(tmp_path / "in.txt"), "--model"]
    assert main([*command, str(exports.student / "float")]) == 0
    native = capfdbinary.readouterr().out
    assert native.count(b"\n") == 4
    for runtime in ("ctranslate2", "onnx", "huggingface"):
        assert main([*command, str(exports.get(runtime, "float32")), "--runtime", runtime]) == 0
        assert capfdbinary.readouterr().out.split() == native.split()
