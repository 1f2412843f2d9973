"""From a YAML file or flat keyword arguments to a checked `RunConfig`.

Refuses: unknown keys (with the nearest known name), keys given twice, values out of range, and a setting given both
flat and nested with different values. Every refusal is one line that names the file, the key, the value and the remedy.
Relative paths in a file are relative to that file; those of keyword arguments and overrides, and `output_dir`, to where
the command runs. All but `output_dir` are absolute once a config is built, so that a run can be resumed from anywhere.
"""

from __future__ import annotations

import copy
import difflib
import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from cvm_translator.config.schema import QuantizationConfig, RunConfig
from cvm_translator.errors import ConfigError

# What the flat keyword arguments of the specification set.
FLAT_KEYS: dict[str, tuple[str, ...]] = {
    "num_iterations": ("distillation", "num_iterations"),
    "batch_size": ("distillation", "batch_size"),
    "learning_rate": ("distillation", "learning_rate"),
    "temperature": ("distillation", "temperature"),
    "alpha": ("distillation", "alpha"),
    "beta": ("distillation", "beta"),
    "warmup_steps": ("distillation", "warmup_steps"),
    "weight_decay": ("distillation", "weight_decay"),
    "max_grad_norm": ("distillation", "max_grad_norm"),
    "grad_accum_steps": ("distillation", "grad_accum_steps"),
    "label_smoothing": ("distillation", "label_smoothing"),
    "precision": ("distillation", "precision"),
    "validation_frequency": ("validation", "every_steps"),
    "quality_threshold": ("guard", "quality_threshold"),
    "degradation_threshold": ("guard", "degradation_threshold"),
    "max_rollbacks": ("guard", "max_rollbacks"),
    "quantization_bits": ("quantization", "bits"),
    "quantization_method": ("quantization", "method"),
    "vocab_size": ("tokenizer", "vocab_size"),
    "source_language": ("corpus", "source_language"),
    "target_language": ("corpus", "target_language"),
}

# What flat keyword arguments leave out: the corpus and the models of configs/quickstart.yaml. The student's training
# settings that are not given are the specification's.
DEFAULTS: dict[str, Any] = {
    "corpus": {"preset": "gettext_de_en"},
    "tokenizer": {"vocab_size": 4000},
    "teacher": {
        "model": {
            "dim": 256,
            "num_heads": 4,
            "feed_forward_dim": 1024,
            "encoder_layers": 6,
            "decoder_layers": 2,
            "max_length": 64,
        },
        "training": {"num_iterations": 2000, "batch_size": 64, "learning_rate": 1.2e-3, "warmup_steps": 500},
    },
    "student": {
        "model": {
            "dim": 256,
            "num_heads": 4,
            "feed_forward_dim": 1024,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "dropout": 0.05,
            "max_length": 64,
        },
        "init": "teacher_layers",
    },
}


class DistillationConfig(RunConfig):
    """A run's settings from keyword arguments, flat (`num_iterations=10000`) or nested (`guard={...}`), or both.

    What is left out has a stated default: the specification's training settings, the small models and the public
    German-English corpus. Raises `ConfigError`.
    """

    def __init__(self, **settings: Any) -> None:
        data = _unflatten(settings)
        _resolve_paths(data, Path.cwd())
        super().__init__(**_checked("DistillationConfig", data))


def build_quantization(settings: dict[str, Any]) -> QuantizationConfig:
    """Quantisation settings of their own, as the command line gives them: one that would change nothing is refused.

    Raises `ConfigError`.
    """
    try:
        config = QuantizationConfig(**settings)
    except ValidationError as error:
        raise ConfigError(_describe_problem(error.errors(include_url=False)[0], "quantization")) from None
    if config.method == "mixed" and "bits" in settings:
        raise ConfigError(f"quantization.bits {config.bits}: method mixed chooses the bits of each layer; leave it out")
    for name in ("group_size", "symmetric"):
        if name in settings and (config.method == "mixed" or config.bits != 4):
            raise ConfigError(
                f"quantization.{name} {settings[name]!r} is that of 4-bit weights: leave it out, or choose method"
                " weight_only with bits 4"
            )
    return config


def load_config(
    path: Path | str, overrides: list[str] | None = None, output_dir: Path | str | None = None
) -> RunConfig:
    """Read a YAML file, apply `key.subkey=value` overrides and the output folder, and check everything."""
    path = Path(path)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file; see configs/ for examples") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a readable YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds no settings; see configs/ for examples")
    _require_names(data, str(path))
    data = _unflatten(data)
    _resolve_paths(data, path.resolve().parent)
    for override in overrides or []:
        _apply_override(data, override)
    _resolve_paths(data, Path.cwd())
    if output_dir is not None:
        data["output_dir"] = str(output_dir)
    return RunConfig(**_checked(str(path), data))


def dump_config(config: RunConfig) -> str:
    """The config as YAML with every default spelled out."""
    return yaml.safe_dump(config.to_plain(), sort_keys=False, allow_unicode=True)


# ------------------------------------------------------------------------------------------------------------ details


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which YAML would silently keep the last."""


def _construct_mapping(loader: Any, node: Any) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if isinstance(key, list | dict):
            raise yaml.YAMLError(f"{key!r} is no name of a setting (line {line})")
        if key in seen:
            raise yaml.YAMLError(f"key {key!r} is given twice (line {line}); keep one")
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)


def _unflatten(settings: dict[str, Any]) -> dict[str, Any]:
    """Move flat keys to their nested places and fill in the sections that are missing altogether.

    Nothing in the result is shared with the caller's settings or the defaults: it is changed further on.
    """
    nested = copy.deepcopy(settings)
    for flat, (section, key) in FLAT_KEYS.items():
        if flat not in nested:
            continue
        value = nested.pop(flat)
        target = nested.setdefault(section, {})
        if isinstance(target, dict):
            if target.get(key, value) != value:
                raise ConfigError(
                    f"{flat}={value!r} contradicts {section}.{key}={target[key]!r}: they are one setting, give it once"
                )
            target[key] = value
    for section, default in DEFAULTS.items():
        nested.setdefault(section, copy.deepcopy(default))
    corpus = nested["corpus"]
    if isinstance(corpus, dict) and "train" not in corpus:
        corpus.setdefault("preset", DEFAULTS["corpus"]["preset"])
    return nested


def _require_names(data: Any, origin: str) -> None:
    """Refuse keys that YAML does not read as text, such as `1:` or `on:`."""
    if isinstance(data, dict):
        for key, value in data.items():
            if not isinstance(key, str):
                raise ConfigError(f"{origin}: {key!r} is no name of a setting: correct it, or put it in quotes")
            _require_names(value, origin)
    elif isinstance(data, list):
        for value in data:
            _require_names(value, origin)


def _resolve_paths(data: dict[str, Any], base: Path) -> None:
    """Make relative paths absolute, in place; what is no such path is left for the checks to refuse."""

    def resolve(section: Any, *keys: str) -> None:
        if isinstance(section, dict):
            for key in keys:
                if isinstance(section.get(key), str | Path):
                    section[key] = str(base / Path(section[key]).expanduser())

    def resolve_local(section: Any, key: str) -> None:
        """A name that may be one on a hub is a path where there is such a file or folder."""
        if isinstance(section, dict) and isinstance(section.get(key), str | Path):
            local = base / Path(section[key]).expanduser()
            section[key] = str(local if local.exists() else section[key])

    corpus = data.get("corpus")
    resolve(corpus, "cache_dir")
    if isinstance(corpus, dict):
        for split in ("train", "validation", "test", "unseen"):
            sources = corpus.get(split)
            for source in sources if isinstance(sources, list) else []:
                if isinstance(source, dict) and source.get("format") == "huggingface":
                    resolve_local(source, "path")
                else:
                    resolve(source, "path", "source_path", "target_path")
    resolve(data.get("tokenizer"), "path")
    resolve(data.get("teacher"), "path", "cache_dir")
    resolve(data.get("quantization"), "plan")
    for key in ("bertscore_model", "comet_model"):
        resolve_local(data.get("validation"), key)


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: expected key=value, such as distillation.num_iterations=100")
    *parents, last = FLAT_KEYS.get(key, tuple(key.split(".")))
    section: Any = data
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"--set {override}: {parent} is a value, not a section")
    try:
        section[last] = yaml.safe_load(text)
    except yaml.YAMLError:
        section[last] = text


def _checked(origin: str, data: dict[str, Any]) -> dict[str, Any]:
    """Return `data` if `RunConfig` accepts it; else raise the first problem as one line."""
    try:
        RunConfig(**data)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        problem = next((found for found in problems if found["type"] == "extra_forbidden"), problems[0])
        if problem["type"] == "extra_forbidden":
            key = ".".join(str(part) for part in problem["loc"])
            raise ConfigError(f"{origin}: unknown setting {key}{_suggest(problem['loc'])}") from None
        raise ConfigError(f"{origin}: {_describe_problem(problem)}") from None
    return data


def _describe_problem(problem: ErrorDetails, *section: str) -> str:
    """One of pydantic's findings: the setting, what is wrong and, where it is no whole section, the value."""
    key = ".".join([*section, *map(str, problem["loc"])])
    value = problem.get("input")
    shown = f" (got {value!r:.80})" if not isinstance(value, dict) else ""
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key or 'settings'}: {message}{shown}"


def _suggest(location: tuple[int | str, ...]) -> str:
    """The nearest known name beside `location`, else the nearest anywhere."""
    *parents, name = location
    beside = _names_at(RunConfig, [str(part) for part in parents])
    if len(parents) == 0:
        beside = beside | set(FLAT_KEYS)
    everywhere = _all_names(RunConfig, ())
    close = difflib.get_close_matches(str(name), sorted(beside), n=1, cutoff=0.5)
    if close and name not in everywhere:
        return f": did you mean {'.'.join([*map(str, parents), close[0]])}?"
    close = difflib.get_close_matches(str(name), sorted(everywhere), n=1, cutoff=0.6)
    if close:
        return f": did you mean {everywhere[close[0]]}?"
    return f": known here are {', '.join(sorted(beside))}"


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [model for argument in typing.get_args(annotation) for model in _models_in(argument)]
    return []


def _names_at(model: type[BaseModel], parents: list[str]) -> set[str]:
    """Field names of the settings that lie at a path; list indices and union tags are passed over."""
    models = [model]
    for part in parents:
        inner = [
            found
            for candidate in models
            if part in candidate.model_fields
            for found in _models_in(candidate.model_fields[part].annotation)
        ]
        models = inner or models
    return {name for candidate in models for name in candidate.model_fields}


def _all_names(model: type[BaseModel], prefix: tuple[str, ...]) -> dict[str, str]:
    names: dict[str, str] = {}
    for name, field in model.model_fields.items():
        for inner in _models_in(field.annotation):
            names |= _all_names(inner, (*prefix, name))
        names[name] = ".".join((*prefix, name))
    return names
