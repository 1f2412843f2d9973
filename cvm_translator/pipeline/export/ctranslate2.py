"""The model in CTranslate2's format: model.bin, config.json, shared_vocabulary.json, and vmap.txt where asked for.

The specification is filled directly, tensor by tensor, so neither Transformers nor CTranslate2's converters are needed,
and integers are the native ones: CTranslate2's grid is this program's (scale = 127 / absmax of a row).

Source sentences get their end mark from CTranslate2 (`add_source_eos`); decoding starts with the end mark. A sentence
of more tokens than there are positions is an error in CTranslate2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.models.runtimes.ctranslate2 import MAP_FILE
from cvm_translator.models.transformer import FIRST_POSITION, CvmTransformer, compute_positions
from cvm_translator.quantization.deployed import Int8Linear, Int8TiedEmbedding


def build_specification(library: Any, model: CvmTransformer, tokenizer: Tokenizer, num_positions: int) -> Any:
    """CTranslate2's TransformerSpec, validated; for a float32 or an int8 model."""
    config = model.config
    specification = library.specs.TransformerSpec.from_config(
        (config.encoder_layers, config.decoder_layers),
        config.num_heads,
        pre_norm=True,
        activation=library.specs.Activation.RELU,
    )
    positions = compute_positions(num_positions + FIRST_POSITION, config.dim)[FIRST_POSITION:].numpy()
    encoder, decoder = specification.encoder, specification.decoder
    for side, norm, embeddings in (
        (encoder, model.encoder_norm, encoder.embeddings[0]),
        (decoder, model.decoder_norm, decoder.embeddings),
    ):
        side.scale_embeddings = float(config.dim) ** 0.5
        side.position_encodings.encodings = positions
        _set_norm(side.layer_norm, norm)
        _set_weight(embeddings, model.embedding)
    _set_weight(decoder.projection, model.embedding)
    for part, layer in zip(encoder.layer, model.encoder_layers, strict=True):
        _set_self_attention(part.self_attention, layer)
        _set_feed_forward(part.ffn, layer)
    for part, layer in zip(decoder.layer, model.decoder_layers, strict=True):
        _set_self_attention(part.self_attention, layer)
        _set_cross_attention(part.attention, layer)
        _set_feed_forward(part.ffn, layer)
    pieces = [tokenizer.id_to_piece(index) for index in range(tokenizer.vocab_size)]
    specification.register_source_vocabulary(pieces)
    specification.register_target_vocabulary(pieces)
    settings = specification.config
    settings.bos_token, settings.eos_token = pieces[Tokenizer.BOS_ID], pieces[Tokenizer.EOS_ID]
    settings.unk_token, settings.decoder_start_token = pieces[Tokenizer.UNK_ID], pieces[Tokenizer.EOS_ID]
    settings.add_source_bos, settings.add_source_eos = False, True
    specification.validate()
    return specification


def write_ctranslate2(
    library: Any,
    folder: Path,
    model: CvmTransformer,
    tokenizer: Tokenizer,
    *,
    num_positions: int | None = None,
    vocabulary_map: str | None = None,
) -> None:
    """Write the files that CTranslate2 loads into an existing folder."""
    specification = build_specification(library, model, tokenizer, num_positions or model.config.max_length + 1)
    # Only finds equal tensors and keeps one of each: the numbers are in their final format already.
    specification.optimize(quantization=None)
    specification.save(str(folder))
    if vocabulary_map is not None:
        (folder / MAP_FILE).write_text(vocabulary_map, encoding="utf-8")


def _set_norm(part: Any, module: Any) -> None:
    part.gamma, part.beta = _to_numpy(module.weight), _to_numpy(module.bias)


def _set_weight(part: Any, module: Any) -> None:
    part.weight = _to_numpy(module.weight)
    if isinstance(module, Int8Linear | Int8TiedEmbedding):
        part.weight_scale = np.reciprocal(_to_numpy(module.weight_scale))


def _set_linear(part: Any, module: Any) -> None:
    _set_weight(part, module)
    part.bias = _to_numpy(module.bias)


def _set_self_attention(part: Any, layer: Any) -> None:
    _set_norm(part.layer_norm, layer.attention_norm)
    for linear, module in zip(part.linear, (layer.attention.qkv, layer.attention.out), strict=True):
        _set_linear(linear, module)


def _set_cross_attention(part: Any, layer: Any) -> None:
    _set_norm(part.layer_norm, layer.cross_attention_norm)
    attention = layer.cross_attention
    for linear, module in zip(part.linear, (attention.q, attention.kv, attention.out), strict=True):
        _set_linear(linear, module)


def _set_feed_forward(part: Any, layer: Any) -> None:
    _set_norm(part.layer_norm, layer.feed_forward_norm)
    _set_linear(part.linear_0, layer.feed_forward.up)
    _set_linear(part.linear_1, layer.feed_forward.down)


def _to_numpy(tensor: Any) -> Any:
    return tensor.detach().cpu().contiguous().numpy()
