"""How much arithmetic a model's forward pass is: multiplications and additions of its matrix products.

Norms, softmaxes and embeddings' lookups are left out, as is usual (Chowdhery et al., 2022, arXiv:2204.02311, appendix
B); padding counts for nothing, so what padding costs shows as a lower utilisation.
"""

from __future__ import annotations

from dataclasses import dataclass

from cvm_translator.config.schema import ModelConfig


@dataclass(frozen=True)
class TokenCounts:
    """Real tokens of a batch, end marks included."""

    num_sentences: int
    num_source: int
    num_target: int


def count_forward_flops(config: ModelConfig, vocab_size: int, tokens: TokenCounts) -> float:
    """Of a teacher-forced pass and the logits of all target tokens; attention is that of sentences of mean length."""
    width, inner = config.dim, config.feed_forward_dim
    source_length = tokens.num_source / tokens.num_sentences
    target_length = tokens.num_target / tokens.num_sentences
    projections, feed_forward = 4 * width * width, 2 * width * inner

    def attention(num_queries: float, num_keys: float) -> float:
        return 2 * width * num_queries * num_keys

    encoder = tokens.num_source * (projections + feed_forward) + attention(tokens.num_source, source_length)
    own = tokens.num_target * projections + attention(tokens.num_target, target_length) / 2  # each sees what is before
    cross = (tokens.num_target + tokens.num_source) * projections / 2 + attention(tokens.num_target, source_length)
    decoder = own + cross + tokens.num_target * feed_forward
    logits = count_logit_flops(width, vocab_size, tokens.num_target) / 2
    return 2.0 * (config.encoder_layers * encoder + config.decoder_layers * decoder + logits)


def count_logit_flops(width: int, vocab_size: int, num_target: int) -> float:
    """Of the output matrix alone."""
    return 2.0 * width * vocab_size * num_target
