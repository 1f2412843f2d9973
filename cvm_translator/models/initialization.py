"""First weights: random ones that suit a pre-norm model with a tied matrix, or a teacher's.

Random weights depend on the seed alone, not on the global generator, the device or the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from cvm_translator.config.schema import check_layer_copy
from cvm_translator.errors import ConfigError
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.quantization import TiedEmbedding


@torch.no_grad()
def init_random(model: CvmTransformer, seed: int) -> None:
    """Embeddings N(0, 1/D) (unit variance after the factor √D), linear layers Xavier-uniform, biases 0, norms 1.

    Layers that write to the residual stream are scaled by 1/√(2 · depth), so that its variance does not grow with depth
    (Radford et al., 2019); fused projections are drawn as the separate ones would be.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, TiedEmbedding):
            module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * module.weight.shape[1] ** -0.5)
        elif isinstance(module, nn.Linear):
            fan_out, fan_in = module.weight.shape
            if name.endswith((".qkv", ".kv")):
                fan_out = fan_in
            bound = (6.0 / (fan_in + fan_out)) ** 0.5
            if name.endswith((".out", ".down")):
                in_encoder = name.startswith("encoder")
                depth = model.config.encoder_layers if in_encoder else model.config.decoder_layers
                bound /= (2.0 * depth) ** 0.5
            module.weight.copy_((torch.rand(module.weight.shape, generator=generator) * 2 - 1) * bound)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def choose_layers(num_teacher: int, num_student: int) -> list[int]:
    """Evenly spaced teacher layers, first and last included (the first alone for a student of one layer)."""
    if num_student == 1:
        return [0]
    return [round(i * (num_teacher - 1) / (num_student - 1)) for i in range(num_student)]


@torch.no_grad()
def init_from_teacher(
    student: CvmTransformer,
    teacher: CvmTransformer,
    encoder_layers_from: Sequence[int] | None = None,
    decoder_layers_from: Sequence[int] | None = None,
) -> None:
    """Copy the teacher's embedding, norms and chosen layers into the student.

    Raises ConfigError, naming the sizes, where the two do not have the same widths.
    """
    if student.vocab_size != teacher.vocab_size:
        raise ConfigError(
            f"student.init teacher_layers: the student's vocabulary is {student.vocab_size}, the teacher's"
            f" {teacher.vocab_size}; make them equal or use student.init random"
        )
    try:
        check_layer_copy(student.config, teacher.config, encoder_layers_from, decoder_layers_from)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    encoder = encoder_layers_from or choose_layers(len(teacher.encoder_layers), len(student.encoder_layers))
    decoder = decoder_layers_from or choose_layers(len(teacher.decoder_layers), len(student.decoder_layers))
    student.embedding.load_state_dict(teacher.embedding.state_dict())
    student.encoder_norm.load_state_dict(teacher.encoder_norm.state_dict())
    student.decoder_norm.load_state_dict(teacher.decoder_norm.state_dict())
    for layer, index in zip(student.encoder_layers, encoder, strict=True):
        layer.load_state_dict(teacher.encoder_layers[index].state_dict())
    for layer, index in zip(student.decoder_layers, decoder, strict=True):
        layer.load_state_dict(teacher.decoder_layers[index].state_dict())
