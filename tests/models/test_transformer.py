"""Incremental against teacher-forced, padding, sizes, quantised forms, dropout."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from cvm_translator.config.model_presets import MODEL_PRESETS
from cvm_translator.config.schema import ModelConfig
from cvm_translator.models.attention import attend
from cvm_translator.models.decoding import pad_sources
from cvm_translator.models.dropout import dropout
from cvm_translator.models.transformer import CvmTransformer, compute_positions
from cvm_translator.quantization import AdvancedQuantizer

SOURCES = [[5, 6, 7, 8, 9], [4, 13], [10, 11, 12, 4]]
TGT = torch.randint(4, 14, (3, 20), generator=torch.Generator().manual_seed(7))
TGT[:, 0] = 2


def run_steps(model, src, mask, tgt):
    state = model.start(model.encode(src, mask), mask)
    return torch.stack([model.step(tgt[:, t], state) for t in range(tgt.shape[1])], dim=1)


def compare_incremental_with_teacher_forced(model, sources, exact):
    src, mask = pad_sources(sources, "cpu")
    hidden, matrix = model(src, mask, TGT)
    logits = hidden @ matrix.T
    difference = (run_steps(model, src, mask, TGT) - logits).abs() / logits.abs().max()
    if exact:
        assert difference.max() < 1e-5
    else:  # float noise may turn a value that lies halfway between two steps of the grid
        assert difference.median() < 0.003
        assert difference.max() < 0.05


@pytest.mark.parametrize("sources", [SOURCES, [[5, 6], [7, 8], [9, 9]]], ids=["padded", "unpadded"])
@torch.no_grad()
def test_incremental_equals_teacher_forced(make_model, form, deploy, sources):
    exact = form in ("float32", "float16", "int8_weights", "int4/padded")
    compare_incremental_with_teacher_forced(deploy(make_model()), sources, exact)


@torch.no_grad()
def test_incremental_equals_teacher_forced_when_fake_quantised(make_model):
    model = make_model()
    model.set_fake_quantization(True)
    compare_incremental_with_teacher_forced(model, SOURCES, exact=False)


@torch.no_grad()
def test_selected_and_repeated_rows_go_on_as_themselves(make_model):
    model = make_model()
    src, mask = pad_sources(SOURCES, "cpu")
    expected = run_steps(model, src, mask, TGT)
    state = model.start(model.encode(src, mask), mask)
    for t in range(5):
        model.step(TGT[:, t], state)
    rows = torch.tensor([2, 0, 0])
    state.select(rows)
    for t in range(5, TGT.shape[1]):
        torch.testing.assert_close(model.step(TGT[rows, t], state), expected[rows, t], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_padding_changes_nothing(make_model):
    model = make_model()
    src, mask = pad_sources(SOURCES, "cpu")
    hidden, _ = model(src, mask, TGT)
    for i, source in enumerate(SOURCES):
        alone, alone_mask = pad_sources([source], "cpu")
        torch.testing.assert_close(model(alone, alone_mask, TGT[i : i + 1])[0][0], hidden[i], atol=1e-5, rtol=1e-5)


def test_positions_are_fairseqs():
    table = compute_positions(10, 8)
    for position in (0, 2, 9):
        rates = [math.exp(-math.log(10000) * i / 3) for i in range(4)]
        expected = [math.sin(position * r) for r in rates] + [math.cos(position * r) for r in rates]
        torch.testing.assert_close(table[position], torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_fake_quantised_step_rounds_the_matrix_once_and_trains_every_weight(make_model):
    model = make_model().train()
    model.set_fake_quantization(True)
    src, mask = pad_sources(SOURCES, "cpu")
    hidden, matrix = model(src, mask, TGT)
    assert torch.equal(matrix, model.embedding.matrix())
    assert not torch.equal(matrix, model.embedding.weight)
    torch.testing.assert_close(model.embedding.round_hidden(hidden), hidden)
    (hidden @ matrix.T).log_softmax(-1)[..., 5].sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    model.set_fake_quantization(False)
    assert model(src, mask, TGT)[1].data_ptr() == model.embedding.weight.data_ptr()  # not a copy


@torch.no_grad()
def test_int8_model_computes_what_training_saw(make_model):
    model = make_model()
    model.set_fake_quantization(True)
    src, mask = pad_sources(SOURCES, "cpu")
    hidden, matrix = model(src, mask, TGT)
    int8_hidden, int8_matrix = AdvancedQuantizer().convert(model)(src, mask, TGT)
    assert torch.equal(int8_matrix, matrix)
    assert (
        int8_hidden - hidden
    ).abs().max() < 0.02 * hidden.abs().max()  # one step of the grid, where a tie falls apart
    assert (int8_hidden - hidden).abs().mean() < 1e-4 * hidden.abs().mean()


def test_gradients_in_bfloat16_follow_float32(make_model):
    src, mask = pad_sources(SOURCES, "cpu")
    gradients = []
    for enabled in (False, True):
        model = make_model()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            hidden, matrix = model(src, mask, TGT)
        (hidden.float() @ matrix.T).log_softmax(-1)[..., 5].mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.99


@pytest.mark.parametrize("causal", [False, True])
def test_written_out_attention_equals_the_kernel(causal):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8) for _ in range(3))
    mask = None if causal else torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)[:, None, None]
    expected = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    actual = attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), mask, causal=causal)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, atol=0.03, rtol=0.03)


def preset(name: str) -> tuple[ModelConfig, int]:
    """The sizes of a preset and a vocabulary that goes with them."""
    return ModelConfig.model_validate(name), 32_000 if name.startswith(("spec", "deep")) else 8_000


def count_parameters(name: str) -> int:
    config, vocab_size = preset(name)
    d, f = config.dim, config.feed_forward_dim
    norm, attention, feed_forward = 2 * d, 4 * d * d + 4 * d, 2 * d * f + d + f
    encoder_layer = attention + feed_forward + 2 * norm
    decoder_layer = 2 * attention + feed_forward + 3 * norm
    layers = config.encoder_layers * encoder_layer + config.decoder_layers * decoder_layer
    return vocab_size * d + layers + 2 * norm


@pytest.mark.parametrize("name", MODEL_PRESETS)
def test_presets_have_the_parameters_of_their_sizes(name):
    with torch.device("meta"):
        model = CvmTransformer(*preset(name))
    assert model.num_parameters() == count_parameters(name)
    assert AdvancedQuantizer("qat", 4).convert(model).num_parameters() == count_parameters(name)


def test_construction_and_conversion_in_place_use_no_random_numbers_of_the_run(make_model):
    model = make_model()
    before = torch.get_rng_state()
    AdvancedQuantizer().convert(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_statistics_scale_and_gradient():
    torch.manual_seed(0)
    values = torch.ones(1001, 333, requires_grad=True)
    dropped = dropout(values, 0.3, True)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.005)
    assert (dropped == 0).float().mean(0).std() < 0.02
    dropped.sum().backward()
    assert torch.equal(values.grad, dropped.detach())
    assert dropout(values, 0.3, False) is values
    torch.manual_seed(0)
    assert torch.equal(dropout(values, 0.3, True), dropped)
