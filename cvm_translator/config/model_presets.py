"""Model sizes that are known by name: `model: spec_student`, or `model: {preset: spec_student, dropout: 0.2}`."""

from __future__ import annotations

from typing import Any

MODEL_PRESETS: dict[str, dict[str, Any]] = {
    # The sizes of the specification, meant for a vocabulary of 32,000.
    "spec_teacher": {
        "dim": 768,
        "num_heads": 12,
        "feed_forward_dim": 3072,
        "encoder_layers": 12,
        "decoder_layers": 12,
    },
    "spec_student": {"dim": 512, "num_heads": 8, "feed_forward_dim": 2048, "encoder_layers": 6, "decoder_layers": 6},
    # Most of the time goes into the decoder, which runs once a token (Kasai et al., 2021, arXiv:2006.10369).
    "deep_encoder_student": {
        "dim": 512,
        "num_heads": 8,
        "feed_forward_dim": 2048,
        "encoder_layers": 6,
        "decoder_layers": 2,
    },
    # For two cores and a vocabulary of 4,000 to 8,000.
    "small_teacher": {
        "dim": 256,
        "num_heads": 4,
        "feed_forward_dim": 1024,
        "encoder_layers": 6,
        "decoder_layers": 3,
        "dropout": 0.2,
    },
    "small_student": {"dim": 256, "num_heads": 4, "feed_forward_dim": 1024, "encoder_layers": 3, "decoder_layers": 1},
    # For tests.
    "tiny": {
        "dim": 32,
        "num_heads": 2,
        "feed_forward_dim": 64,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "dropout": 0.0,
        "max_length": 64,
    },
}
