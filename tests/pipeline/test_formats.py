"""What a run's quantisation settings become: courses, roundings, deployed copies, calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cvm_translator.config.schema import METHOD_BITS, ModelConfig, QuantizationConfig
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.errors import ConfigError
from cvm_translator.models.initialization import init_random
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.pipeline.formats import (
    Calibration,
    build_deploy,
    build_prepare,
    choose_plan,
    load_plan,
    name_format,
    save_plan,
)
from cvm_translator.quantization import (
    LayerFormat,
    convert_with_plan,
    count_bytes,
    find_fake_plan,
    find_plan,
    name_plan,
    plan_to_plain,
)
from cvm_translator.quantization.convert import find_layers
from cvm_translator.training.widths import UNROUNDED_BITS

SIZES = {"dim": 16, "num_heads": 2, "feed_forward_dim": 32, "encoder_layers": 1, "decoder_layers": 1}
SOURCES = [[4, 5], [6, 7, 8, 9, 10, 11], [12], [5, 4, 6], [9, 9]]
EXTRA: dict[str, dict[str, Any]] = {"mixed": {"target_compression_ratio": 1.6}}
SETTINGS = [
    QuantizationConfig(method=method, **({"bits": bits} if bits else {}), **EXTRA.get(method, {}))
    for method, widths in METHOD_BITS.items()
    for bits in widths or (None,)
]


@pytest.fixture
def model() -> CvmTransformer:
    model = CvmTransformer(ModelConfig(**SIZES, dropout=0.0, max_length=16), 24)
    init_random(model, 1)
    return model.eval()


def build_calibration(sources: list[list[int]] = SOURCES, num_sentences: int = 9, seed: int = 3) -> Calibration:
    return Calibration(DistillationDataset(sources, [source[::-1] for source in sources]), num_sentences, seed)


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: f"{settings.method}-{settings.bits}")
def test_every_method_trains_and_is_deployed(settings: QuantizationConfig, model: CvmTransformer) -> None:
    prepare, deploy = build_prepare(settings), build_deploy(settings, build_calibration())
    for bits in settings.width_schedule:
        prepare(model, bits)
        is_seen = settings.method in ("qat", "progressive") and bits != UNROUNDED_BITS
        assert {layer_format.bits for layer_format in find_fake_plan(model).values()} == {bits if is_seen else 32}
        prepare(model, UNROUNDED_BITS)
        assert name_plan(find_fake_plan(model)) == "float32"
        plan = find_plan(deploy(model, bits))
        if settings.method == "none":
            assert name_plan(plan) == "float32" and name_format(settings, bits) is None
        elif settings.method != "mixed":
            assert {layer_format.bits for layer_format in plan.values()} == {bits}
            assert name_format(settings, bits) == ("float16" if bits == 16 else f"int{bits}")
        else:
            assert len({layer_format.bits for layer_format in plan.values()}) > 1
            assert name_format(settings, bits) == "mixed"


def test_calibration_logits_do_not_depend_on_padding(model: CvmTransformer) -> None:
    together = build_calibration().compute_logits(model)  # by target length, so in this order
    ordered = sorted(SOURCES, key=len)
    alone = torch.cat([build_calibration([source]).compute_logits(model) for source in ordered])
    assert together.shape == alone.shape == (sum(len(source) + 1 for source in SOURCES), 24)
    torch.testing.assert_close(together.sort(0).values, alone.sort(0).values, rtol=1e-4, atol=1e-5)


def test_calibration_chooses_the_same_sentences_each_time(model: CvmTransformer) -> None:
    many = [[4 + i % 20, 4 + i // 20] for i in range(200)]
    first = build_calibration(many, num_sentences=20)
    logits = first.compute_logits(model)
    assert torch.equal(logits, first.compute_logits(model))
    assert torch.equal(logits, build_calibration(many, num_sentences=20).compute_logits(model))
    assert not torch.equal(logits, build_calibration(many, num_sentences=20, seed=4).compute_logits(model))


def test_of_a_plan_s_file_only_the_plan_is_used(model: CvmTransformer, tmp_path: Path) -> None:
    """The sizes, losses and words of another model are not told of this one."""
    plan = dict.fromkeys(find_layers(model), LayerFormat("int8"))
    stale = {"message": "9.99 times smaller", "num_bytes": 1, "target_met": False, "layers": {}, "loss": 0.5}
    path = tmp_path / "plan.yaml"
    save_plan(path, stale | {"plan": plan_to_plain(plan)})
    chosen = choose_plan(QuantizationConfig(method="mixed", plan=path), model, build_calibration())
    num_bytes, float_bytes = count_bytes(convert_with_plan(model, plan)), count_bytes(model)
    assert chosen == {
        "message": f"plan of {path}: {float_bytes / num_bytes:.2f} times smaller, {num_bytes:,} bytes",
        "float_bytes": float_bytes,
        "num_bytes": num_bytes,
        "compression_ratio": float_bytes / num_bytes,
        "plan": plan_to_plain(plan),
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as a quantisation plan"),
        ("[]", "is no quantisation plan"),
        ("plan: {a: {kind: int5}}", "layer 'a': kind 'int5' is no number format"),
    ],
)
def test_what_is_no_plan_is_named(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"plan\.yaml: .*{words}"):
        load_plan(tmp_path / "plan.yaml")
