"""Model folders: what goes in comes out, and nothing else is believed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from benchmarks.reliability.hostile_files import (
    HOSTILE_CONFIGS,
    HOSTILE_WEIGHTS,
    MARK,
    edit_header,
    edit_plan,
    rewrite_config,
)
from cvm_translator.errors import ModelError
from cvm_translator.models import folder as folder_module
from cvm_translator.models.decoding import pad_sources, translate_ids
from cvm_translator.models.description import FORMAT
from cvm_translator.models.folder import load_model, save_model
from cvm_translator.quantization import AdvancedQuantizer, count_bytes, find_plan


@pytest.fixture
def saved(tmp_path, make_model, tokenizer) -> Path:
    model = make_model(tokenizer.vocab_size)
    return save_model(tmp_path / "model", model, tokenizer, source_language="de", target_language="en")


def test_round_trip(tmp_path, make_model, tokenizer, form, deploy):
    model = deploy(make_model(tokenizer.vocab_size))
    target = tmp_path / "some" / "model"
    save_model(target, model, tokenizer, source_language="de", target_language="en", metadata={"step": 7})
    before = torch.get_rng_state()
    loaded = load_model(target)
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors", "sentencepiece.model"]
    assert [path.name for path in target.parent.iterdir()] == ["model"]
    assert loaded.config["format"] == FORMAT
    assert (loaded.config["number_format"], loaded.config["metadata"]) == (form.split("/")[0], {"step": 7})
    assert find_plan(loaded.model) == find_plan(model)
    assert loaded.model.num_parameters() == model.num_parameters()
    assert loaded.tokenizer.encode(["kara lone"]) == tokenizer.encode(["kara lone"])
    assert loaded.model.config == model.config
    assert not loaded.model.training
    src, mask = pad_sources([[5, 6, 7], [9]], "cpu")
    tgt = torch.tensor([[2, 5, 6], [2, 7, 8]])
    with torch.no_grad():
        assert torch.equal(loaded.model(src, mask, tgt)[0], model(src, mask, tgt)[0])
    (loaded.model(src, mask, tgt)[0].sum()).backward() if form == "float32" else None
    assert translate_ids(loaded.model, [[5, 6, 7], [9]]) == translate_ids(model, [[5, 6, 7], [9]])
    assert (target / "model.safetensors").stat().st_size == count_bytes(model)


LOAD = "import sys; from cvm_translator.models.folder import load_model; [load_model(path) for path in sys.argv[1:]]"


def test_a_model_is_loaded_without_torch_s_compiler(tmp_path, make_model, tokenizer):
    """Its import takes longer than all else that a short command does."""
    model, folders = make_model(tokenizer.vocab_size), []
    for quantizer in (AdvancedQuantizer("none"), AdvancedQuantizer("qat", 8), AdvancedQuantizer("qat", 4)):
        folders.append(tmp_path / str(len(folders)))
        save_model(folders[-1], quantizer.convert(model), tokenizer, source_language="de", target_language="en")
    check = "; print(any(name.startswith(('torch._dynamo', 'torch._inductor')) for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", LOAD + check, *folders], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_student_folder_means_its_deployed_model(tmp_path, make_model, tokenizer):
    model = make_model(tokenizer.vocab_size)
    languages = {"source_language": "de", "target_language": "en"}
    save_model(tmp_path / "float", model, tokenizer, **languages)
    assert load_model(tmp_path).config["number_format"] == "float32"
    save_model(tmp_path / "int8", AdvancedQuantizer().convert(model), tokenizer, **languages)
    assert load_model(tmp_path).config["number_format"] == "int8"
    save_model(tmp_path / "int4", AdvancedQuantizer("qat", 4).convert(model), tokenizer, **languages)
    assert load_model(tmp_path).config["number_format"] == "int4"


def test_the_weights_of_a_fake_quantised_model_are_float32(tmp_path, make_model, tokenizer):
    model = make_model(tokenizer.vocab_size)
    model.set_fake_quantization(True)
    save_model(tmp_path / "model", model, tokenizer, source_language="de", target_language="en")
    assert load_model(tmp_path / "model").config["number_format"] == "float32"


def test_int8_folders_from_before_plans_load(tmp_path, make_model, tokenizer):
    model = AdvancedQuantizer("dynamic").convert(make_model(tokenizer.vocab_size))
    folder = save_model(tmp_path / "model", model, tokenizer, source_language="de", target_language="en")
    assert json.loads((folder / "config.json").read_text())["quantization"]["plan"]["embedding"] == {"kind": "int8"}
    rewrite_config(folder, quantization=None)
    assert translate_ids(load_model(folder).model, [[5, 6, 7]]) == translate_ids(model, [[5, 6, 7]])


def test_existing_folders_are_replaced_only_when_asked(saved, make_model, tokenizer):
    languages = {"source_language": "de", "target_language": "en"}
    other = make_model(tokenizer.vocab_size, seed=5)
    with pytest.raises(ModelError, match="exists already"):
        save_model(saved, other, tokenizer, **languages)
    save_model(saved, other, tokenizer, **languages, replace=True)
    assert torch.equal(load_model(saved).model.embedding.weight, other.embedding.weight)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    foreign = saved.parent / "holiday"
    foreign.mkdir()
    (foreign / "photo.jpg").write_bytes(b"x")
    with pytest.raises(ModelError, match="not a model folder"):
        save_model(foreign, other, tokenizer, **languages, replace=True)
    assert (foreign / "photo.jpg").exists()


@pytest.mark.parametrize("function", ["rename", "fsync"])
def test_a_failed_save_leaves_the_old_model(saved, make_model, tokenizer, monkeypatch, function):
    expected = load_model(saved).model.embedding.weight
    real, calls = getattr(os, function), []

    def fail_at_the_second(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(folder_module.os, function, fail_at_the_second)
    with pytest.raises(OSError, match="No space"):
        save_model(
            saved,
            make_model(tokenizer.vocab_size, 9),
            tokenizer,
            source_language="de",
            target_language="en",
            replace=True,
        )
    monkeypatch.undo()
    assert torch.equal(load_model(saved).model.embedding.weight, expected)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_unsavable_models_are_refused(tmp_path, make_model, tokenizer):
    languages = {"source_language": "de", "target_language": "en"}
    broken = make_model(tokenizer.vocab_size)
    with torch.no_grad():
        broken.decoder_norm.weight[3] = float("nan")
    with pytest.raises(ModelError, match=r"decoder_norm\.weight holds NaN"):
        save_model(tmp_path / "a", broken, tokenizer, **languages)
    with pytest.raises(ModelError, match="pieces"):
        save_model(tmp_path / "b", make_model(40), tokenizer, **languages)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- hostile folders


def test_no_model_folders(tmp_path):
    with pytest.raises(ModelError, match="there is no model folder"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ModelError, match="is no model folder"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="does not say format"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "sentencepiece.model"])
def test_missing_files(saved, name):
    (saved / name).unlink()
    with pytest.raises(ModelError, match=f"{name} is missing"):
        load_model(saved)


@pytest.mark.parametrize("name", ["model.safetensors", "sentencepiece.model", "config.json"])
def test_every_truncation_and_flipped_bit_is_found(saved, name):
    path = saved / name
    content = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(0, len(content), (25,), generator=generator).tolist():
        flipped = bytearray(content)
        flipped[position] ^= 1 << (position % 8)
        for damaged in (bytes(flipped), content[:position]):
            path.write_bytes(damaged)
            if name == "config.json" and _is_same_json(damaged, content):
                continue  # the case of a letter inside an escape or the like: the content is the same
            with pytest.raises(ModelError):
                load_model(saved)


def _is_same_json(one: bytes, other: bytes) -> bool:
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


@pytest.mark.parametrize("content", HOSTILE_WEIGHTS.values(), ids=HOSTILE_WEIGHTS)
def test_hostile_weights(saved, content, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (saved / "model.safetensors").write_bytes(content)
    rewrite_config(saved)
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        load_model(saved)
    assert not (tmp_path / MARK).exists()


def test_weights_of_another_shape_type_or_name(saved):
    path = saved / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    cases = {
        "lacks": {name: tensor for name, tensor in tensors.items() if name != "encoder_norm.bias"},
        "unknown": {**tensors, "extra": torch.zeros(3)},
        "asks for": {**tensors, "encoder_norm.bias": torch.zeros(7)},
        "F16": {**tensors, "encoder_norm.bias": tensors["encoder_norm.bias"].half()},
        "NaN": {**tensors, "encoder_norm.bias": tensors["encoder_norm.bias"] * float("nan")},
    }
    for message, content in cases.items():
        safetensors.torch.save_file(content, path)
        rewrite_config(saved)
        with pytest.raises(ModelError, match=message):
            load_model(saved)


@pytest.mark.parametrize("changes", HOSTILE_CONFIGS.values(), ids=HOSTILE_CONFIGS)
def test_configurations_that_do_not_fit(saved, changes):
    rewrite_config(saved, **changes)
    with pytest.raises(ModelError):
        load_model(saved)


@pytest.mark.parametrize("case", list(edit_plan({"encoder_layers.0.attention.qkv": {}})))
def test_quantization_plans_that_do_not_fit(tmp_path, make_model, tokenizer, case):
    model = AdvancedQuantizer("weight_only", 4, group_size=16).convert(make_model(tokenizer.vocab_size))
    folder = save_model(tmp_path / "model", model, tokenizer, source_language="de", target_language="en")
    plan = json.loads((folder / "config.json").read_text())["quantization"]["plan"]
    section = edit_plan(plan)[case]
    for number_format in ("int4", "int8", "int8_static", "mixed"):
        rewrite_config(folder, quantization=section, number_format=number_format)
        with pytest.raises(ModelError) as caught:
            load_model(folder)
        assert len(str(caught.value)) < 600


def test_tokenizer_of_another_size_or_none(saved, tokenizer, tmp_path, make_model):
    grown = make_model(tokenizer.vocab_size + 1)
    tensors = {name: tensor.contiguous() for name, tensor in grown.state_dict().items()}
    safetensors.torch.save_file(tensors, saved / "model.safetensors")
    rewrite_config(saved, vocab_size=tokenizer.vocab_size + 1)
    with pytest.raises(ModelError, match="pieces"):
        load_model(saved)
    (saved / "sentencepiece.model").write_bytes(b"not a tokenizer")
    rewrite_config(saved, vocab_size=tokenizer.vocab_size + 1)
    with pytest.raises(ModelError, match=r"sentencepiece\.model"):
        load_model(saved)


def test_a_copied_folder_loads(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    load_model(tmp_path / "copy")


def test_headers_that_do_not_fit_the_data(saved):
    good = (saved / "model.safetensors").read_bytes()
    for case, content in edit_header(good).items():
        (saved / "model.safetensors").write_bytes(content)
        rewrite_config(saved)
        with pytest.raises(ModelError, match=r"model\.safetensors"):
            load_model(saved)
            pytest.fail(f"{case} was loaded")
