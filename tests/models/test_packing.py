"""Packed layers: the same products, and the model as it was afterwards."""

from __future__ import annotations

import pytest
import torch

from cvm_translator.config.schema import ModelConfig
from cvm_translator.models import packing
from cvm_translator.models.decoding import translate_ids
from cvm_translator.models.initialization import init_random
from cvm_translator.models.packing import PackedEmbedding, PackedLinear, pack_layers, packed_layers
from cvm_translator.models.transformer import CvmTransformer

SIZES = ModelConfig(dim=64, num_heads=4, feed_forward_dim=128, encoder_layers=2, decoder_layers=2, dropout=0.0)
SOURCES = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16]]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> CvmTransformer:
    """Of layers that are all worth packing."""
    monkeypatch.setattr(packing, "_LEAST_ELEMENTS", {torch.float32: 0, torch.bfloat16: 0})
    model = CvmTransformer(SIZES, 300)
    init_random(model, 3)
    return model.eval()


def count(model: CvmTransformer, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=str)
@torch.inference_mode()
def test_packed_layers_compute_the_same(model: CvmTransformer, dtype: torch.dtype, tolerance: float) -> None:
    if not packing._has_products(dtype):
        pytest.skip(f"this processor does not multiply {dtype}")
    model.to(dtype)
    src, mask, tgt = torch.tensor(SOURCES[:1]), torch.ones(1, 4, dtype=torch.bool), torch.tensor([[2, 7, 8]])
    hidden, matrix = model(src, mask, tgt)
    with packed_layers(model):
        assert count(model, PackedEmbedding) == 1 and count(model, PackedLinear) == 4 * 2 + 7 * 2 + 1
        packed_hidden, packed_matrix = model(src, mask, tgt)
        logits = model.embedding.project(packed_hidden[0])
    assert packed_matrix.data_ptr() == matrix.data_ptr()
    torch.testing.assert_close(packed_hidden, hidden, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(logits, packed_hidden[0] @ matrix.T, atol=tolerance, rtol=tolerance)


def test_translations_are_those_of_the_plain_layers(model: CvmTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    for beam_size in (1, 3):
        packed = translate_ids(model, SOURCES, beam_size=beam_size)
        with monkeypatch.context() as patched:
            patched.setattr(packing, "_has_products", lambda dtype: False)
            assert translate_ids(model, SOURCES, beam_size=beam_size) == packed


def test_the_layers_come_back_whatever_happens(model: CvmTransformer) -> None:
    before = list(model.modules())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def stop() -> None:
        assert count(model, PackedLinear)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        translate_ids(model, SOURCES, on_batch=stop)
    assert all(new is old for new, old in zip(model.modules(), before, strict=True))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in weights.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layers_that_would_not_gain_stay() -> None:
    model = CvmTransformer(SIZES, 5000)
    assert len(pack_layers(model)) == 1 and count(model, PackedEmbedding) == 1  # 64 × 5,000 elements
    assert not pack_layers(model)  # what is packed stays packed
    rounded = CvmTransformer(SIZES, 5000)
    rounded.set_fake_quantization(True)
    assert not pack_layers(rounded)


def test_without_such_products_nothing_is_packed(model: CvmTransformer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not pack_layers(model)
