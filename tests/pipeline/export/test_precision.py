"""Decoding a float model in bfloat16, and where that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cvm_translator.errors import ModelError
from cvm_translator.models.runtimes import RuntimeSettings, load_runtime, native


def test_bfloat16_translates_like_float32_but_for_rounding(exports: Any) -> None:
    sources, _ = exports.read_rows()
    rounded = load_runtime("native", exports.student / "float", RuntimeSettings(num_threads=1, precision="bfloat16"))
    ours, plain = rounded.translate(sources), exports.load_native("float32").translate(sources)
    assert len(ours) == len(sources)
    assert sum(a == b for a, b in zip(ours, plain, strict=True)) >= 0.8 * len(sources)


@pytest.mark.parametrize("is_packed", [True, False])
def test_norms_and_sums_stay_float32(is_packed: bool, exports: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if not is_packed:  # as where PyTorch has no packed products, and on other devices
        monkeypatch.setattr(native, "pack_layers", lambda model: {})
    settings = RuntimeSettings(num_threads=1, precision="bfloat16")
    model = load_runtime("native", exports.student / "float", settings)._model  # type: ignore[attr-defined]
    assert model.decoder_norm.weight.dtype == torch.float32
    seen: list[tuple[torch.dtype, torch.dtype]] = []
    for layer in model.decoder_layers:
        layer.register_forward_hook(lambda layer, inputs, x: seen.append((inputs[0].dtype, x.dtype)))
        layer.feed_forward.down.register_forward_hook(lambda layer, inputs, x: seen.append((x.dtype, x.dtype)))
    ids = torch.tensor([[5, 6, 2]])
    with torch.inference_mode():
        model(ids, torch.ones_like(ids, dtype=torch.bool), ids)
    assert set(seen) == {(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)}


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
