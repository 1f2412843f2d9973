"""A model on disk: `config.json`, `model.safetensors` and `sentencepiece.model` in one folder.

    config.json   format, version, number_format (the kind that all layers share, or mixed), quantization (its `plan`:
    the format of each layer; left out in float32), model (ModelConfig), vocab_size, languages, metadata, files (size
    and SHA-256 of the other two), checksum (of the rest of config.json)

Guarantees: `save_model` writes a folder beside the target, fsyncs every file and renames it, so the target is the old
folder or the new one. `load_model` compares sizes and hashes before it parses anything, knows every tensor's name,
shape and type before it allocates one, uses no random numbers, and refuses weights that are NaN or infinite.

Refuses, with a ModelError: folders that are no models, missing or altered files, oversized or malformed headers,
tokenizers of another size. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cvm_translator.config.schema import ModelConfig
from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.errors import CvmError, ModelError
from cvm_translator.models.description import (
    CONFIG_FILE,
    FORMAT,
    TOKENIZER_FILE,
    VERSION,
    WEIGHTS_FILE,
    build_empty_model,
    describe_numbers,
    load_model_config,
)
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.runs.atomic import TEMPORARY_PREFIX, fsync_directory, sha256_file, sha256_json

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 20_000
_TYPES = {"F32": torch.float32, "F16": torch.float16, "I8": torch.int8, "U8": torch.uint8}
DEPLOYED_FOLDERS = ("mixed", "int4", "int8", "float16", "float")
"""What a run's `student` folder may hold, the folder that is meant first."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to translate (evaluation mode), its tokenizer, and config.json as plain data."""

    model: CvmTransformer
    tokenizer: Tokenizer
    config: dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- saving


def save_model(
    folder: Path | str,
    model: CvmTransformer,
    tokenizer: Tokenizer,
    *,
    source_language: str,
    target_language: str,
    metadata: dict[str, Any] | None = None,
    replace: bool = False,
) -> Path:
    """Write a model folder; with `replace` it may take the place of another model folder. Returns the folder."""
    folder = Path(folder)
    _check_target(folder, replace)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    _check_finite(tensors, "the model to be saved")
    if tokenizer.vocab_size != model.vocab_size:
        raise ModelError(
            f"the tokenizer has {tokenizer.vocab_size} pieces, the model {model.vocab_size}: they must be equal"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f"{TEMPORARY_PREFIX}{folder.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir()
    try:
        # Not save_file, whose error on a full disk is no OSError.
        (temporary / WEIGHTS_FILE).write_bytes(safetensors.torch.save(tensors))
        shutil.copyfile(tokenizer.path, temporary / TOKENIZER_FILE)
        config = {
            "format": FORMAT,
            "version": VERSION,
            **describe_numbers(model),
            "model": model.config.model_dump(mode="json"),
            "vocab_size": model.vocab_size,
            "source_language": source_language,
            "target_language": target_language,
            "metadata": metadata or {},
            "files": {name: _describe_file(temporary / name) for name in (WEIGHTS_FILE, TOKENIZER_FILE)},
        }
        config = json.loads(json.dumps(config, allow_nan=False))
        config["checksum"] = sha256_json(config)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (temporary / CONFIG_FILE).write_text(text, encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            _fsync(path)
        _move_into_place(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _check_target(folder: Path, replace: bool) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ModelError(f"{folder} is a file: name a folder for the model")
    if any(folder.iterdir()):
        if not replace:
            raise ModelError(f"{folder} exists already: remove it or choose another folder")
        if not (folder / CONFIG_FILE).is_file():
            raise ModelError(f"{folder} is not a model folder, so it is not replaced: choose another folder")


def _describe_file(path: Path) -> dict[str, Any]:
    return {"num_bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _fsync(path: Path) -> None:
    if path.is_dir():
        fsync_directory(path)
        return
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def _move_into_place(temporary: Path, folder: Path) -> None:
    old = None
    if folder.exists():
        old = folder.parent / f"{TEMPORARY_PREFIX}old-{folder.name}-{uuid.uuid4().hex[:8]}"
        os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except OSError:
        if old is not None:
            os.rename(old, folder)
        raise
    fsync_directory(folder.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------ loading


def find_model_folder(path: Path | str) -> Path:
    """The folder itself, or the deployed model in a run's `student` folder: the first of `DEPLOYED_FOLDERS` in it."""
    path = Path(path)
    for folder in (path, *(path / name for name in DEPLOYED_FOLDERS)):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if not path.exists():
        raise ModelError(f"there is no model folder {path}: check the path")
    raise ModelError(f"{path} is no model folder: it has no {CONFIG_FILE}")


def load_model(path: Path | str, device: torch.device | str = "cpu") -> LoadedModel:
    """Load and verify a model folder, or the deployed one in a run's `student` folder (see `find_model_folder`)."""
    folder = find_model_folder(path)
    config = load_model_config(folder)
    for name in (WEIGHTS_FILE, TOKENIZER_FILE):
        _verify_file(folder / name, config["files"].get(name))
    weights = folder / WEIGHTS_FILE
    model = _build_empty(config, weights, _read_header(weights))
    try:
        tensors = safetensors.torch.load_file(weights)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"{weights} is not a safetensors file ({error}): copy or make the model again") from error
    _check_finite(tensors, str(weights))
    model.load_state_dict(tensors, strict=True, assign=True)
    model.reset_positions()
    try:
        tokenizer = Tokenizer.load(folder / TOKENIZER_FILE)
    except (CvmError, OSError, RuntimeError) as error:
        raise ModelError(f"{folder / TOKENIZER_FILE} cannot be loaded ({error})") from error
    if tokenizer.vocab_size != model.vocab_size:
        raise ModelError(
            f"{folder / TOKENIZER_FILE} has {tokenizer.vocab_size} pieces, but the model {model.vocab_size}: "
            "use the tokenizer that the model was trained with"
        )
    return LoadedModel(model.to(device).eval(), tokenizer, config)


def _verify_file(path: Path, entry: Any) -> None:
    if not path.is_file():
        raise ModelError(f"{path} is missing: the model folder is incomplete")
    if not isinstance(entry, dict):
        raise ModelError(f"{path} is not listed in {CONFIG_FILE}: the model folder is incomplete")
    if path.stat().st_size != entry.get("num_bytes"):
        raise ModelError(f"{path} has {path.stat().st_size} bytes, not {entry.get('num_bytes')}: copy the model again")
    if sha256_file(path) != entry.get("sha256"):
        raise ModelError(f"{path} was altered: its SHA-256 does not match {CONFIG_FILE}; copy or make the model again")


def _read_header(path: Path) -> dict[str, Any]:
    """The tensors that a safetensors file declares, by name, none of them loaded."""
    num_bytes = path.stat().st_size
    with open(path, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if num_bytes < 8 or length > min(MAX_HEADER_BYTES, num_bytes - 8):
            raise ModelError(f"{path} is not a safetensors file: its header would have {length} bytes")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{path} is not a safetensors file: its header is not JSON") from error
    if not isinstance(header, dict) or not all(isinstance(entry, dict) for entry in header.values()):
        raise ModelError(f"{path} is not a safetensors file: its header is malformed")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise ModelError(f"{path} declares {len(header)} tensors, more than {MAX_TENSORS}")
    return header


def _build_empty(config: dict[str, Any], weights: Path, header: dict[str, Any]) -> CvmTransformer:
    """The model without storage, once every tensor in the header has the name, shape and type that it needs."""
    model_config = ModelConfig.model_validate(config["model"])
    if model_config.encoder_layers + model_config.decoder_layers > len(header):
        raise ModelError(f"{weights} holds {len(header)} tensors, too few for the layers that {CONFIG_FILE} names")
    model = build_empty_model(config, weights.parent)
    expected = {name: (list(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() ^ header.keys()):
        verb = "lacks" if name in expected else "holds the unknown"
        raise ModelError(f"{weights} {verb} tensor {name[:100]!r}: it does not belong to this {CONFIG_FILE}")
    for name, (shape, dtype) in expected.items():
        found = header[name].get("shape"), header[name].get("dtype")
        if found[0] != shape or _TYPES.get(str(found[1])) != dtype:
            raise ModelError(
                f"{weights}: tensor {name} is {found[1]} {found[0]}, but {CONFIG_FILE} asks for {dtype} {shape}"
            )
    return model


def _check_finite(tensors: dict[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(f"{where}: tensor {name} holds NaN or infinite values; use an earlier model")
