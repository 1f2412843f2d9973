"""A model on disk: `config.json`, `model.safetensors` and `sentencepiece.model` in one folder.

    config.json   format, version, number_format (float32 | int8), model (ModelConfig), vocab_size, languages,
    metadata, files (size and SHA-256 of the other two), checksum (of the rest of config.json)

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

import pydantic
import safetensors.torch
import torch
from torch import Tensor

from cvm_translator.config.schema import ModelConfig
from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.errors import CvmError, ModelError
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.quantization import (
    AdvancedQuantizer,
    FourBitLinear,
    Int8Linear,
    Int8TiedEmbedding,
    QuantizationType,
)
from cvm_translator.runs.atomic import TEMPORARY_PREFIX, fsync_directory, sha256_file, sha256_json

FORMAT, VERSION = "cvm-translator", 1
CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "sentencepiece.model"
NUMBER_FORMATS = ("float32", "int8")

MAX_CONFIG_BYTES = 1 << 20
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 20_000
_TYPES = {"F32": torch.float32, "I8": torch.int8}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to translate (evaluation mode), its tokenizer, and config.json as plain data."""

    model: CvmTransformer
    tokenizer: Tokenizer
    config: dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- saving


def find_number_format(model: CvmTransformer) -> str:
    """float32 or int8; a model in another format has no folder form."""
    kinds = {type(module) for module in model.modules()}
    if FourBitLinear in kinds:
        raise ModelError("a model with 4-bit layers cannot be saved as a model folder: save it as float32 or int8")
    return "int8" if kinds & {Int8Linear, Int8TiedEmbedding} else "float32"


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
            "number_format": find_number_format(model),
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
    """The folder itself, or its `int8` or `float` subfolder (what a run's `student` folder holds)."""
    path = Path(path)
    for folder in (path, path / "int8", path / "float"):
        if (folder / CONFIG_FILE).is_file():
            return folder
    if not path.exists():
        raise ModelError(f"there is no model folder {path}: check the path")
    raise ModelError(f"{path} is no model folder: it has no {CONFIG_FILE}")


def load_model(path: Path | str, device: torch.device | str = "cpu") -> LoadedModel:
    """Load and verify a model folder, or the deployed one (int8, else float) in a run's `student` folder."""
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


def load_model_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, checked."""
    path = folder / CONFIG_FILE
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ModelError(f"{path} has more than {MAX_CONFIG_BYTES} bytes: it is not a model's configuration")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} cannot be read as JSON ({error}): {folder} is no model folder") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ModelError(f"{path} does not say format {FORMAT!r}: {folder} is no model folder of this program")
    if config.get("version") != VERSION:
        raise ModelError(
            f"{path} has version {config.get('version')!r}, this program reads {VERSION}: use a newer program"
        )
    content = {key: value for key, value in config.items() if key != "checksum"}
    if config.get("checksum") != sha256_json(content):
        raise ModelError(f"{path} was altered: its checksum does not match; copy or make the model again")
    if config.get("number_format") not in NUMBER_FORMATS:
        raise ModelError(
            f"{path} has number_format {config.get('number_format')!r}: known are {', '.join(NUMBER_FORMATS)}"
        )
    vocab_size = config.get("vocab_size")
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 4:
        raise ModelError(f"{path} has vocab_size {vocab_size!r}: it must be a number from 4 up")
    try:
        ModelConfig.model_validate(config.get("model"))
    except pydantic.ValidationError as error:
        raise ModelError(f"{path} has a bad model section: {error.errors()[0]['msg']}") from error
    if not isinstance(config.get("files"), dict):
        raise ModelError(f"{path} lists no files: {folder} is no complete model folder")
    return config


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
    if model_config.max_length * model_config.dim > 1 << 28:
        raise ModelError(
            f"{weights.parent / CONFIG_FILE} has max_length {model_config.max_length}: too long to be true"
        )
    with torch.device("meta"):
        model = CvmTransformer(model_config, config["vocab_size"])
        if config["number_format"] == "int8":
            model = AdvancedQuantizer(QuantizationType.DYNAMIC_INT8).convert(model)
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
