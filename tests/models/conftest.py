"""Small models and a real tokenizer."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import torch
from torch import nn

from cvm_translator.config.schema import ModelConfig
from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.models.decoding import pad_sources
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.quantization import LayerFormat, convert_with_plan, find_plan

SMALL = ModelConfig(
    dim=32, num_heads=4, feed_forward_dim=48, encoder_layers=2, decoder_layers=2, dropout=0.1, max_length=24
)


@pytest.fixture
def make_model() -> Callable[..., CvmTransformer]:
    """A model with lively random weights: every bias and norm counts, outputs end sooner or later and do not just
    repeat."""

    def make(vocab_size: int = 14, seed: int = 0, config: ModelConfig = SMALL) -> CvmTransformer:
        model = CvmTransformer(config, vocab_size).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                scale = 0.15 if name == "embedding.weight" else 0.4 if "norm" in name else 0.25
                parameter.copy_(noise * scale + (1.0 if name.endswith("_norm.weight") else 0.0))
            model.decoder_norm.weight.mul_(torch.randn(config.dim, generator=generator) * 1.5)
        return model

    return make


FORMS: dict[str, Callable[[int], LayerFormat]] = {
    "float32": lambda i: LayerFormat("float32"),
    "float16": lambda i: LayerFormat("float16"),
    "int8": lambda i: LayerFormat("int8"),
    "int8_static": lambda i: LayerFormat("int8_static"),
    "int8_weights": lambda i: LayerFormat("int8_weights"),
    "int4": lambda i: LayerFormat("int4", 32),
    "int4/row": lambda i: LayerFormat("int4", None, symmetric=False),
    "int4/padded": lambda i: LayerFormat("int4", 22, symmetric=i % 2 == 0),
    "mixed": lambda i: [LayerFormat("int4", 64), LayerFormat("int8"), LayerFormat("float16"), LayerFormat()][i % 4],
}
"""The format of a model's i-th layer."""


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    """Each number format of a whole model, `kind/variant`."""
    return str(request.param)


@pytest.fixture
def deploy(form: str) -> Callable[[CvmTransformer], CvmTransformer]:
    """Converts a model to the format `form`."""

    def calibrate(model: nn.Module) -> None:
        model(*pad_sources([[5, 6, 7, 8, 9], [9]], "cpu"), torch.tensor([[2, 5, 6, 9], [2, 7, 8, 10]]))

    def convert(model: CvmTransformer) -> CvmTransformer:
        plan = {name: FORMS[form](i) for i, name in enumerate(find_plan(model))}
        return convert_with_plan(model, plan, calibrate)

    return convert


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    words = [f"{a}{b}{c}" for a in ("ka", "lo", "mi", "tu") for b in ("ra", "ne", "so") for c in ("", "s", "ld")]
    texts = [" ".join(words[i : i + 6]) + "." for i in range(len(words) - 6)] * 3
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=stream,
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        bos_id=0,
        pad_id=1,
        eos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    path: Path = tmp_path_factory.mktemp("tokenizer") / "sentencepiece.model"
    path.write_bytes(stream.getvalue())
    return Tokenizer.load(path)
