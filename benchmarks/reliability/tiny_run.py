"""A real run of the whole pipeline that takes seconds: four digits in German words to the same in English words.

The text, the model and the step counts are tiny; every stage and every process is the product's.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import Arm

DIGITS = {
    "de": ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun"],
    "en": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
}
NUM_PAIRS = 2000
MODEL: dict[str, Any] = {"dim": 64, "num_heads": 2, "feed_forward_dim": 128, "encoder_layers": 1, "decoder_layers": 1}
MODEL |= {"max_length": 32}
TRAINING: dict[str, Any] = {"batch_size": 64, "learning_rate": 5.0e-3, "warmup_steps": 20}

# Accumulation, averaging, dropout and late quantisation, so that a resume has something to get wrong.
CONFIG: dict[str, Any] = {
    "num_threads": 1,
    "tensorboard": False,
    "corpus": {
        "train": [{"format": "tsv", "path": "digits.tsv"}],
        "validation_size": 100,
        "test_size": 100,
        "cleaning": {"language_check": False},
    },
    "tokenizer": {"vocab_size": 300},
    "teacher": {
        "model": MODEL | {"dropout": 0.05},
        "training": TRAINING | {"num_iterations": 200, "validate_every_steps": 50, "checkpoint_every_steps": 10},
    },
    "student": {"model": MODEL | {"dropout": 0.02}},
    "distillation": TRAINING
    | {"num_iterations": 300, "temperature": 1.0, "checkpoint_every_steps": 10}
    | {"grad_accum_steps": 2, "ema_decay": 0.8},
    "validation": {"every_steps": 50, "metrics": ["bleu", "chrf"], "weights": {"bleu": 1.0, "chrf": 1.0}},
    "quantization": {"method": "qat", "bits": 8, "start_fraction": 0.5},
}


def spell(number: int, language: str) -> str:
    """The digits of a number in words."""
    return " ".join(DIGITS[language][int(digit)] for digit in f"{number:04}")


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with nested changes; neither is altered."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def write_config(work: Path, **changes: Any) -> Path:
    """`work/tiny.yaml`, the config with nested changes, and its text beside it."""
    work.mkdir(parents=True, exist_ok=True)
    numbers = random.Random(5).sample(range(10_000), NUM_PAIRS)
    lines = [f"{spell(number, 'de')}\t{spell(number, 'en')}\n" for number in numbers]
    (work / "digits.tsv").write_text("".join(lines), encoding="utf-8")
    path = work / "tiny.yaml"
    path.write_text(yaml.safe_dump(merge(CONFIG, changes)), encoding="utf-8")
    return path


def build_arm(work: Path, name: str, config: Path, *settings: str) -> Arm:
    """One run of the config, in `work/NAME`."""
    return Arm(name, config, settings, work / name)
