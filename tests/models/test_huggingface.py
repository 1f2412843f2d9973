"""The model is M2M100: copied weights give the same logits and the same greedy output."""

from __future__ import annotations

import pytest
import torch
from transformers import M2M100Config, M2M100ForConditionalGeneration

from cvm_translator.config.schema import ModelConfig
from cvm_translator.errors import ModelError
from cvm_translator.models.decoding import pad_sources, translate_ids
from cvm_translator.models.huggingface import to_m2m100
from cvm_translator.models.initialization import init_random
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.quantization import AdvancedQuantizer

CONFIG = ModelConfig(
    dim=48, num_heads=4, feed_forward_dim=80, encoder_layers=3, decoder_layers=2, dropout=0.1, max_length=40
)
SOURCES = [[5, 6, 7, 8, 9, 10, 11], [12, 13], [14, 15, 16, 17], [9]]


@pytest.fixture(scope="module")
def pair() -> tuple[CvmTransformer, M2M100ForConditionalGeneration]:
    model = CvmTransformer(CONFIG, 120).eval()
    init_random(model, 3)
    with torch.no_grad():
        for parameter in model.parameters():  # so that no bias is 0 and no norm is 1
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    arguments, weights = to_m2m100(model)
    twin = M2M100ForConditionalGeneration(M2M100Config(**arguments)).eval()
    missing, unexpected = twin.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not missing
    return model, twin


def test_logits_of_a_padded_batch(pair):
    model, twin = pair
    src, mask = pad_sources(SOURCES, "cpu")
    tgt = torch.tensor([[2, 30, 31, 32, 33], [2, 40, 1, 1, 1], [2, 50, 51, 1, 1], [2, 3, 60, 61, 1]])
    with torch.no_grad():
        hidden, matrix = model(src, mask, tgt)
        reference = twin(input_ids=src, attention_mask=mask.long(), decoder_input_ids=tgt).logits
    real = tgt != 1
    assert (hidden @ matrix.T - reference)[real].abs().max() < 1e-4
    assert reference[real].abs().max() > 1


def test_longest_sequence(pair):
    model, twin = pair
    ids = torch.arange(4, 4 + CONFIG.max_length)[None]
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        hidden, matrix = model(ids, mask, ids)
        reference = twin(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=ids).logits
    assert (hidden @ matrix.T - reference).abs().max() < 1e-4


def test_greedy_output(pair):
    model, twin = pair
    src, mask = pad_sources(SOURCES, "cpu")
    ours = translate_ids(model, SOURCES, max_length_ratio=0.0, max_length_extra=12)
    theirs = twin.generate(
        input_ids=src,
        attention_mask=mask.long(),
        max_new_tokens=12,
        num_beams=1,
        do_sample=False,
        suppress_tokens=[0, 1, 3],
    )
    for our_ids, their_ids in zip(ours, theirs.tolist(), strict=True):
        their_ids = their_ids[1:]  # the start mark
        assert our_ids == (their_ids[: their_ids.index(2)] if 2 in their_ids else their_ids)


def test_integer_models_are_refused(pair):
    with pytest.raises(ModelError, match="float model"):
        to_m2m100(AdvancedQuantizer().convert(pair[0]))
