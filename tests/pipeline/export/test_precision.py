"""Decoding a float model in bfloat16, and where that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cvm_translator.errors import ModelError
from cvm_translator.models.runtimes import RuntimeSettings, load_runtime


def test_bfloat16_translates_like_float32_but_for_rounding(exports: Any) -> None:
    sources, _ = exports.read_rows()
    rounded = load_runtime("native", exports.student / "float", RuntimeSettings(num_threads=1, precision="bfloat16"))
    ours, plain = rounded.translate(sources), exports.load_native("float32").translate(sources)
    assert len(ours) == len(sources)
    assert sum(a == b for a, b in zip(ours, plain, strict=True)) >= 0.8 * len(sources)


@pytest.mark.parametrize(
    ("runtime", "folder", "precision", "message"),
    [
        ("native", "int8", "bfloat16", "is int8, which computes in its own precision: name the float model"),
        ("native", "float", "float8", "unknown precision 'float8': known are float32, bfloat16"),
        ("onnx", "float", "bfloat16", "--precision bfloat16 is for --runtime native: onnx computes as exported"),
    ],
)
def test_other_models_and_runtimes_refuse_it(
    runtime: str, folder: str, precision: str, message: str, exports: Any
) -> None:
    path: Path = exports.student / folder
    with pytest.raises(ModelError, match=message):
        load_runtime(runtime, path, RuntimeSettings(precision=precision))
