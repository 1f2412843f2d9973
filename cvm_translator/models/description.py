"""What a model folder's `config.json` says, checked before anything is built from it.

The number format is the kind that all layers share, or `mixed`; the plan in the `quantization` section gives each
layer's, and the empty model that is to be filled is made from it. Every part may be hostile: what does not fit is one
ModelError, and nothing is allocated for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pydantic
import torch

from cvm_translator.config.schema import ModelConfig
from cvm_translator.errors import ModelError
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.quantization import (
    AdvancedQuantizer,
    Plan,
    convert_with_plan,
    find_plan,
    name_plan,
    parse_plan,
    plan_to_plain,
)
from cvm_translator.runs.atomic import sha256_json

FORMAT, VERSION = "cvm-translator", 1
CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "sentencepiece.model"

MAX_CONFIG_BYTES = 1 << 20


def describe_numbers(model: CvmTransformer) -> dict[str, Any]:
    """The entries `number_format` and, unless it is float32, `quantization` of a model's config.json."""
    plan = find_plan(model)
    number_format = name_plan(plan)
    section = {} if number_format == "float32" else {"quantization": {"plan": plan_to_plain(plan)}}
    return {"number_format": number_format, **section}


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
    vocab_size = config.get("vocab_size")
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool) or vocab_size < 4:
        raise ModelError(f"{path} has vocab_size {vocab_size!r}: it must be a number from 4 up")
    try:
        ModelConfig.model_validate(config.get("model"))
    except pydantic.ValidationError as error:
        raise ModelError(f"{path} has a bad model section: {error.errors()[0]['msg']}") from error
    read_plan(config, path)
    if not isinstance(config.get("files"), dict):
        raise ModelError(f"{path} lists no files: {folder} is no complete model folder")
    return config


def read_plan(config: dict[str, Any], path: Path) -> Plan | None:
    """The format of each layer that the configuration asks for; None where it is the number format of all."""
    number_format, section = config.get("number_format"), config.get("quantization")
    if section is None and number_format in ("float32", "int8"):  # int8 models from before there were plans have none
        return None
    if not isinstance(section, dict) or "plan" not in section:
        raise ModelError(f"{path} has number_format {number_format!r} and no quantization plan: make the model again")
    try:
        plan = parse_plan(section["plan"])
    except ValueError as error:
        raise ModelError(f"{path} has a bad quantization plan: {error}") from error
    if name_plan(plan) != number_format:
        raise ModelError(f"{path} has number_format {number_format!r}, but its plan is {name_plan(plan)}")
    return plan


def build_empty_model(config: dict[str, Any], folder: Path) -> CvmTransformer:
    """The model of a checked configuration without storage, each layer in the format of the plan."""
    path, model_config = folder / CONFIG_FILE, ModelConfig.model_validate(config["model"])
    if model_config.max_length * model_config.dim > 1 << 28:
        raise ModelError(f"{path} has max_length {model_config.max_length}: too long to be true")
    plan = read_plan(config, path)
    try:
        with torch.device("meta"):
            model = CvmTransformer(model_config, config["vocab_size"])
            if plan is None:
                return AdvancedQuantizer("dynamic" if config["number_format"] == "int8" else "none").convert(model)
            return convert_with_plan(model, plan)
    except ValueError as error:
        raise ModelError(f"{path} has a quantization plan of another model: {error}") from error
    except RuntimeError as error:  # sizes beyond what torch can count
        raise ModelError(f"{path} describes a model that cannot exist: {str(error).splitlines()[0]}") from error
