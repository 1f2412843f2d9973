"""The same model as Transformers' M2M100ForConditionalGeneration.

Guarantees: logits and greedy output are equal up to float rounding, since the maths is the same; a test builds both.
Fused projections are cut into M2M100's separate ones. Refuses quantised models: export the float model.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cvm_translator.errors import ModelError
from cvm_translator.models.transformer import BOS_ID, EOS_ID, PAD_ID, CvmTransformer
from cvm_translator.quantization import find_plan, name_plan

_ENCODER_NAMES = {
    "attention_norm": "self_attn_layer_norm",
    "attention.out": "self_attn.out_proj",
    "feed_forward_norm": "final_layer_norm",
    "feed_forward.up": "fc1",
    "feed_forward.down": "fc2",
}
_DECODER_NAMES = {
    **_ENCODER_NAMES,
    "cross_attention_norm": "encoder_attn_layer_norm",
    "cross_attention.q": "encoder_attn.q_proj",
    "cross_attention.out": "encoder_attn.out_proj",
}
_FUSED_NAMES = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "cross_attention.kv": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
}


def to_m2m100(model: CvmTransformer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Keyword arguments of M2M100Config and the state_dict of M2M100ForConditionalGeneration (tensors not copied)."""
    number_format = name_plan(find_plan(model))
    if number_format != "float32":
        raise ModelError(f"the model is {number_format}: convert the float model to M2M100 instead")
    config = model.config
    if config.core_capacity is not None:
        raise ModelError(f"the model keeps {config.core_capacity} slots of attention, which M2M100 does not have")
    arguments: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "max_position_embeddings": config.max_length + 1,
        "encoder_layers": config.encoder_layers,
        "encoder_ffn_dim": config.feed_forward_dim,
        "encoder_attention_heads": config.num_heads,
        "decoder_layers": config.decoder_layers,
        "decoder_ffn_dim": config.feed_forward_dim,
        "decoder_attention_heads": config.num_heads,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "activation_function": "relu",
        "d_model": config.dim,
        "dropout": config.dropout,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "scale_embedding": True,
        "bos_token_id": BOS_ID,
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "decoder_start_token_id": EOS_ID,
        "tie_word_embeddings": True,
    }
    return arguments, _rename_weights(model)


def _rename_weights(model: CvmTransformer) -> dict[str, Tensor]:
    matrix = model.embedding.weight.detach()
    shared = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")
    renamed = {f"{name}.weight": matrix for name in shared}
    for name, tensor in model.state_dict().items():
        if name == "embedding.weight":
            continue
        module, kind = name.rsplit(".", 1)
        if module in ("encoder_norm", "decoder_norm"):
            renamed[f"model.{module.removesuffix('_norm')}.layer_norm.{kind}"] = tensor
            continue
        stack, index, part = module.split(".", 2)
        side = stack.removesuffix("_layers")
        prefix = f"model.{side}.layers.{index}"
        if part in _FUSED_NAMES:
            targets = _FUSED_NAMES[part]
            for target, piece in zip(targets, tensor.chunk(len(targets)), strict=True):
                renamed[f"{prefix}.{target}.{kind}"] = piece
        else:
            names = _ENCODER_NAMES if side == "encoder" else _DECODER_NAMES
            renamed[f"{prefix}.{names[part]}.{kind}"] = tensor
    return renamed
