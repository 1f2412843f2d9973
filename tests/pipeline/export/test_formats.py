"""Each export in its own runtime: the same translations of 200 sentences as the native model's."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch

from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.models.folder import load_model
from cvm_translator.models.runtimes import RuntimeSettings, load_runtime
from cvm_translator.pipeline.export.ctranslate2 import build_specification
from cvm_translator.quantization import AdvancedQuantizer, QuantizationType

# The first test waits for the reference run, and each export is tried in processes of its own.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ODD_TEXTS = [
    "<s> drei </s> vier",
    "<pad><unk>",
    "</s>",
    "<mask> <eos> <0x41>",
    "%s von {0} und %(name)s, 100 %",
    "zwei  Blanke   und\ttab",
    " Rand ",
    "▁unter_strich",
    "emoji 😀 und 日本語",
    "ohne>>de<< Anfang",
    "\u200b\u00a0unsichtbar",
]


def agreement(left: list[str], right: list[str]) -> float:
    return float(np.mean([a.strip() == b.strip() for a, b in zip(left, right, strict=True)]))


@pytest.mark.parametrize("format_name", ["huggingface", "ctranslate2", "onnx", "argos"])
def test_float_exports_translate_as_the_native_model(exports: Any, format_name: str) -> None:
    sources, _ = exports.read_rows()
    theirs = exports.load(format_name, "float32").translate(sources, batch_size=32)
    assert agreement(theirs, exports.load_native("float32").translate(sources)) >= 0.98


@pytest.mark.parametrize("format_name", ["ctranslate2", "onnx", "argos"])
def test_int8_exports_are_as_good_as_the_native_int8_model(exports: Any, format_name: str) -> None:
    sources, references = exports.read_rows()
    texts = [
        runtime.translate(sources, batch_size=32)
        for runtime in (exports.load_native("int8"), exports.load(format_name, "int8"))
    ]
    assert agreement(*texts) >= 0.9
    ours, theirs = (sacrebleu.corpus_bleu(hypotheses, [references]).score for hypotheses in texts)
    assert ours > 50
    assert abs(ours - theirs) <= 0.3


@pytest.mark.parametrize(
    ("format_name", "quantization"),
    [("huggingface", "float32"), ("ctranslate2", "float32"), ("ctranslate2", "int8"), ("onnx", "int8")],
)
def test_a_translation_does_not_depend_on_its_batch_and_lines_stay_lines(
    exports: Any, format_name: str, quantization: str
) -> None:
    runtime = exports.load(format_name, quantization)
    sources = [*exports.read_rows()[0][:20], "", "   ", "zwei " * 300]
    alone = runtime.translate(sources, batch_size=1)
    assert agreement(runtime.translate(sources, batch_size=7), alone) >= 0.9
    assert alone[-3:-1] == ["", ""]
    assert len(alone[-1].split()) > 20


@pytest.mark.parametrize("format_name", ["huggingface", "ctranslate2", "onnx"])
def test_the_readme_s_program_needs_nothing_of_ours(
    exports: Any, format_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = exports.get(format_name, "float32")
    (program,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert "cvm_translator" not in program
    monkeypatch.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(program, {})
    texts = ["Die Datei wurde nicht gefunden.", "Öffnen"]
    expected = exports.load_native("float32").translate(texts)
    shown = eval(output.getvalue())
    # the program has no rule for outputs far longer than their sources
    assert [text[: len(known)] for text, known in zip(shown, expected, strict=True)] == [t.strip() for t in expected]


def test_an_export_says_what_it_is_and_what_was_found(exports: Any) -> None:
    folder = exports.get("ctranslate2", "int8")
    facts = json.loads((folder / "cvm_translator.json").read_text())
    assert (facts["format"], facts["number_format"]) == ("ctranslate2", "int8")
    assert facts["verification"]["num_sentences"] == 200
    assert facts["verification"]["agreement"] > 0.75
    lines = exports.reports["ctranslate2_int8"]
    assert [line.split()[0] for line in lines] == [
        *("model", "map", "map", "verified", "BLEU", "chrF", "weights", "speed", "memory")
    ]
    number = r"[+-]?\d+\.\d\d"
    for line in lines[4:6]:
        scores = rf"{number} -> {number} \({number}, 95 % interval {number} to {number}\) against the float32 model"
        assert re.fullmatch(rf"\w+ +{scores}", line)
    assert re.fullmatch(r"memory +[\d,]+ -> [\d,]+ MiB at their peaks, libraries included", lines[-1])
    for name in ("bleu", "chrf"):
        change = facts["verification"][name]
        assert change["low"] <= change["difference"] <= change["high"]
    # nothing but the export lies beside it
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]


# --------------------------------------------------------------------------------------------------------- Transformers


def test_huggingface_tokenizer_is_ours_on_odd_text(exports: Any) -> None:
    theirs, ours = exports.load("huggingface", "float32").tokenizer, exports.load_native("float32").tokenizer
    assert theirs.encode(ODD_TEXTS) == ours.encode(ODD_TEXTS)
    ids = ours.encode(ODD_TEXTS)
    assert [text.strip() for text in theirs.decode(ids)] == [text.strip() for text in ours.decode(ids)]


def test_huggingface_loads_and_decodes_as_we_do(exports: Any) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    folder = exports.get("huggingface", "float32")
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    assert (type(model).__name__, type(tokenizer).__name__) == ("M2M100ForConditionalGeneration", "MarianTokenizer")
    settings = model.generation_config
    assert (settings.decoder_start_token_id, settings.eos_token_id, settings.max_length) == (2, 2, 48)
    assert settings.forced_bos_token_id is None and settings.forced_eos_token_id is None
    assert settings.num_beams == 1 and not settings.do_sample

    sources, _ = exports.read_rows()
    loaded = load_model(exports.student / "float")
    batch = tokenizer(sources[:16], return_tensors="pt", padding=True)
    targets = tokenizer(exports.read_rows()[1][:16], return_tensors="pt", padding=True)["input_ids"]
    start = torch.cat((torch.full((16, 1), 2), targets), dim=1)
    with torch.no_grad():
        logits = model(**batch, decoder_input_ids=start).logits
        hidden, matrix = loaded.model(batch["input_ids"], batch["attention_mask"].bool(), start)
    real = start != 1
    assert (logits - hidden @ matrix.T)[real].abs().max() < 1e-4
    shown = tokenizer.batch_decode(model.generate(**batch), skip_special_tokens=True)
    assert agreement(shown, exports.load_native("float32").translate(sources[:16])) >= 0.9


# ---------------------------------------------------------------------------------------------------------- CTranslate2


def test_ctranslate2_s_own_quantisation_gives_the_same_integers(exports: Any) -> None:
    import ctranslate2

    loaded = load_model(exports.student / "float")
    int8 = AdvancedQuantizer(QuantizationType.DYNAMIC).convert(loaded.model)
    arguments = (loaded.tokenizer, loaded.model.config.max_length + 1)
    ours, theirs = (build_specification(ctranslate2, model, *arguments) for model in (int8, loaded.model))
    ours.optimize(quantization=None)
    theirs.optimize(quantization="int8")
    ours, theirs = ours.variables(), theirs.variables()
    # the scale of a tensor that goes by another's name is another's too, which CTranslate2 leaves unsaid
    assert all(isinstance(ours.pop(name), str) for name in ours.keys() - theirs.keys())
    assert ours.keys() == theirs.keys()
    num_integers = num_different = 0
    for name, value in ours.items():
        if isinstance(value, str):
            assert theirs[name] == value
        elif value.dtype == "int8" and not value.is_scalar():
            difference = np.abs(value.numpy().astype(int) - theirs[name].numpy())
            assert difference.max() <= 1, name
            num_integers += difference.size
            num_different += int(difference.sum())
        elif not value.is_scalar():
            np.testing.assert_allclose(value.numpy(), theirs[name].numpy(), rtol=1e-6, err_msg=name)
    assert num_integers > 90_000
    assert num_different <= 1  # at a tie: 127 / absmax may differ in its last bit


def test_an_int8_model_folder_is_exported_as_it_is(exports: Any, tmp_path: Path) -> None:
    from cvm_translator.pipeline.export import ExportRequest, export_model

    request = ExportRequest(
        exports.student / "int8", "ctranslate2", tmp_path / "out", vocabulary_map=False, max_drop=1.0
    )
    export_model(request, lambda line: None)
    assert (tmp_path / "out" / "model.bin").read_bytes() == (
        exports.get("ctranslate2", "int8") / "model.bin"
    ).read_bytes()
    assert not (tmp_path / "out" / "vmap.txt").exists()


def test_the_vocabulary_map_restricts_what_is_written(exports: Any) -> None:
    folder = exports.get("ctranslate2", "int8")
    runtime = exports.load("ctranslate2", "int8")
    rules = dict(line.split("\t") for line in (folder / "vmap.txt").read_text(encoding="utf-8").splitlines())
    assert 20 < len(rules[""].split()) <= 100
    tokenizer = Tokenizer.load(folder / "sentencepiece.model")
    for source in exports.read_rows()[0][:20]:
        (ids,) = tokenizer.encode([source])
        allowed = set(rules[""].split())
        for index in ids:
            allowed.update(rules.get(tokenizer.id_to_piece(index), "").split())
        (output,) = runtime.translate_ids([ids])
        assert {tokenizer.id_to_piece(index) for index in output} <= allowed


# ------------------------------------------------------------------------------------------------------ Argos Translate


def test_an_argos_package_has_the_files_that_argos_translate_reads(exports: Any) -> None:
    folder = exports.get("argos", "int8")
    assert [path.name for path in folder.iterdir()] == ["translate-de_en-1_0.argosmodel"]
    with zipfile.ZipFile(folder / "translate-de_en-1_0.argosmodel") as archive:
        names = {name.removeprefix("translate-de_en-1_0/") for name in archive.namelist()}
        metadata = json.loads(archive.read("translate-de_en-1_0/metadata.json"))
        readme = archive.read("translate-de_en-1_0/README.md").decode()
    assert names == {
        *("metadata.json", "README.md", "sentencepiece.model", "cvm_translator.json", "minisbd/rules.onnx"),
        *("model/model.bin", "model/config.json", "model/shared_vocabulary.json"),
    }
    assert "verification" not in readme  # which comes after the package is closed
    assert metadata == {
        "package_version": "1.0",
        "argos_version": "1.11",
        "from_code": "de",
        "from_name": "German",
        "to_code": "en",
        "to_name": "English",
    }


def test_an_argos_package_takes_long_sentences_and_is_the_same_every_time(exports: Any, tmp_path: Path) -> None:
    import ctranslate2

    from cvm_translator.pipeline.export import ExportRequest, export_model

    again = tmp_path / "again.argosmodel"
    assert export_model(ExportRequest(exports.student, "argos", again, max_drop=5.0), lambda line: None) == again
    assert [path.name for path in tmp_path.iterdir()] == ["again.argosmodel"]
    packed = exports.get("argos", "int8") / "translate-de_en-1_0.argosmodel"
    assert again.read_bytes() == packed.read_bytes()
    with zipfile.ZipFile(again) as archive:
        archive.extractall(tmp_path / "package")
    translator = ctranslate2.Translator(str(tmp_path / "package" / "translate-de_en-1_0" / "model"), intra_threads=1)
    assert translator.translate_batch([["▁zwei"] * 1500], max_decoding_length=4)[0].hypotheses[0]


# ----------------------------------------------------------------------------------------------------------------- ONNX


def test_onnx_graphs_compute_the_source_s_keys_and_values_once(exports: Any) -> None:
    import onnx

    folder = exports.get("onnx", "float32")
    encoder, decoder = (onnx.load(folder / name) for name in ("encoder.onnx", "decoder.onnx"))
    assert [value.name for value in encoder.graph.output] == ["present.0.encoder.key", "present.0.encoder.value"]
    assert [value.name for value in decoder.graph.output] == [
        *("present.0.decoder.key", "present.0.decoder.value", "logits", "next_token")
    ]
    names = {tensor.name for tensor in decoder.graph.initializer}
    assert not [name for name in names if "cross_attention.kv" in name or "encoder_layers" in name]


def test_onnx_refuses_beams(exports: Any) -> None:
    with pytest.raises(ValueError, match="decodes greedily; use 1"):
        exports.load("onnx", "float32").translate(["eins"], beam_size=4)


def test_ctranslate2_and_transformers_search_with_beams(exports: Any) -> None:
    sources, references = exports.read_rows()
    for format_name in ("ctranslate2", "huggingface"):
        texts = exports.load(format_name, "float32").translate(sources[:50], beam_size=4, batch_size=64)
        assert sacrebleu.corpus_bleu(texts, [references[:50]]).score > 50


def test_a_student_folder_may_hold_its_ctranslate2_export(exports: Any, tmp_path: Path) -> None:
    os.symlink(exports.get("ctranslate2", "float32"), tmp_path / "ctranslate2")
    texts = exports.read_rows()[0][:3]
    expected = exports.load("ctranslate2", "float32").translate(texts)
    assert load_runtime("ctranslate2", tmp_path).translate(texts) == expected


def test_few_sentences_are_shared_out_among_the_workers(exports: Any) -> None:
    folder = exports.get("ctranslate2", "float32")
    runtime = load_runtime("ctranslate2", folder, RuntimeSettings(num_threads=1, num_workers=2))
    sizes: list[int] = []

    class Watched:
        def __init__(self, translator: Any) -> None:
            self.translator = translator

        def translate_batch(self, batch: list[list[str]], **options: Any) -> Any:
            sizes.append(len(batch))
            return self.translator.translate_batch(batch, **options)

    runtime._translator = Watched(runtime._translator)  # type: ignore[attr-defined]
    texts = ["eins", "zwei", "drei", "vier", "fünf"]
    assert runtime.translate(texts) == exports.load("ctranslate2", "float32").translate(texts)
    assert sizes == [3, 2]
