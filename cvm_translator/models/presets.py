"""Named model sizes: configuration and vocabulary size."""

from __future__ import annotations

from cvm_translator.config.schema import ModelConfig

PRESETS: dict[str, tuple[ModelConfig, int]] = {
    "spec_teacher": (
        ModelConfig(dim=768, num_heads=12, feed_forward_dim=3072, encoder_layers=12, decoder_layers=12),
        32_000,
    ),
    "spec_student": (
        ModelConfig(dim=512, num_heads=8, feed_forward_dim=2048, encoder_layers=6, decoder_layers=6),
        32_000,
    ),
    # Most of the time goes into the decoder, which runs once a token (Kasai et al., 2021, arXiv:2006.10369).
    "deep_encoder_student": (
        ModelConfig(dim=512, num_heads=8, feed_forward_dim=2048, encoder_layers=6, decoder_layers=2),
        32_000,
    ),
    "small_teacher": (
        ModelConfig(dim=256, num_heads=4, feed_forward_dim=1024, encoder_layers=6, decoder_layers=3, dropout=0.2),
        8_000,
    ),
    "small_student": (
        ModelConfig(dim=256, num_heads=4, feed_forward_dim=1024, encoder_layers=3, decoder_layers=1),
        8_000,
    ),
    "tiny": (
        ModelConfig(
            dim=32, num_heads=2, feed_forward_dim=64, encoder_layers=2, decoder_layers=1, dropout=0.0, max_length=64
        ),
        320,
    ),
}
