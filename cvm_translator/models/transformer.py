"""The CVM Transformer: a pre-norm encoder-decoder whose full-attention form is M2M100's, number for number.

One matrix embeds source and target and projects to logits. Embeddings are scaled by √D; positions are sinusoids in
halves (all sines, then all cosines, denominator D/2 − 1) counted from 2; feed-forward layers use ReLU; every linear
layer has a bias; encoder and decoder end in a layer norm. With `core_capacity` the decoder attends to at most so many
key/value slots (see `slots`), which M2M100 does not have. Dropout is applied where M2M100 applies its `dropout`: to
the embeddings and to each residual branch (M2M100's attention and activation dropout are 0 here).

Token ids: bos 0, pad 1, eos 2, unk 3; the decoder starts with eos. Batches are padded on the right; what is computed
at padded positions is meaningless and must not be used. Teacher-forced and incremental decoding agree up to float
rounding.

Shapes: B batch, S source length, T target length, D hidden size, V vocabulary, R = B × beams.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from cvm_translator.config.schema import ModelConfig
from cvm_translator.models.attention import AttentionCache, CrossAttention, SelfAttention, SourceView
from cvm_translator.models.dropout import dropout
from cvm_translator.models.slots import SlotCache
from cvm_translator.quantization import LayerFormat, QuantizableLinear, TiedEmbedding, look_up, set_fake_quantization

BOS_ID, PAD_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
FIRST_POSITION = PAD_ID + 1


def compute_positions(num_positions: int, dim: int) -> Tensor:
    """Sinusoids of positions 0 … num_positions − 1, (num_positions, D) float32, as M2M100 and fairseq compute them."""
    half = dim // 2
    rates = torch.exp(torch.arange(half, dtype=torch.int64).float() * -(math.log(10000.0) / max(half - 1, 1)))
    angles = torch.arange(num_positions, dtype=torch.int64).float()[:, None] * rates[None]
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class FeedForward(nn.Module):
    """Two linear layers with a ReLU between."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = QuantizableLinear(config.dim, config.feed_forward_dim)
        self.down = QuantizableLinear(config.feed_forward_dim, config.dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x).relu_())
        return out


class EncoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = SelfAttention(config.dim, config.num_heads)
        self.feed_forward_norm = nn.LayerNorm(config.dim)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + dropout(self.attention(self.attention_norm(x), mask), self.dropout, self.training)
        return x + dropout(self.feed_forward(self.feed_forward_norm(x)), self.dropout, self.training)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = nn.LayerNorm(config.dim)
        self.attention = SelfAttention(config.dim, config.num_heads, config.core_capacity)
        self.cross_attention_norm = nn.LayerNorm(config.dim)
        self.cross_attention = CrossAttention(config.dim, config.num_heads, config.core_capacity)
        self.feed_forward_norm = nn.LayerNorm(config.dim)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, memory: Tensor, memory_mask: Tensor | None) -> Tensor:
        x = x + dropout(self.attention(self.attention_norm(x), None, causal=True), self.dropout, self.training)
        branch = self.cross_attention(self.cross_attention_norm(x), memory, memory_mask)
        x = x + dropout(branch, self.dropout, self.training)
        return x + dropout(self.feed_forward(self.feed_forward_norm(x)), self.dropout, self.training)

    def step(self, x: Tensor, cache: AttentionCache | SlotCache, source: SourceView) -> Tensor:
        """One new token of each row, x (R, D) -> (R, D)."""
        x = x + self.attention.step(self.attention_norm(x), cache)
        branch = self.cross_attention.attend(self.cross_attention_norm(x)[:, None], source)
        x = x + branch[:, 0]
        x = x + self.feed_forward(self.feed_forward_norm(x))
        return x


@dataclass
class DecoderState:
    """What incremental decoding remembers: each layer's own tokens (R rows) and its view of the source (B rows)."""

    caches: list[AttentionCache | SlotCache]
    sources: list[SourceView]
    matrix: Tensor | None
    """The embedding matrix in float, made once, unless its format is faster without."""
    length: int = 0

    def count_slots(self) -> int:
        """Most keys that an attention head holds, of its own tokens or of the source."""
        keys = [cache.tensors[0] for cache in self.caches] + [source.keys for source in self.sources]
        return max(tensor.shape[2] for tensor in keys)

    def count_bytes(self) -> int:
        """Memory of all keys, values, counts and masks, without what caches hold in reserve."""
        held = [tensor for cache in self.caches for tensor in cache.tensors]
        held += [tensor for source in self.sources for tensor in source if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def reorder(self, rows: Tensor) -> None:
        """Take the decoded tokens of the given rows; each row's source must stay the same (beams of one sentence)."""
        for cache in self.caches:
            cache.select(rows)

    def select(self, rows: Tensor, sources: Tensor | None = None) -> None:
        """Keep the given rows, and the given sources where several rows share one."""
        sources = rows if sources is None else sources
        self.reorder(rows)
        self.sources = [source.select(sources) for source in self.sources]


class CvmTransformer(nn.Module):
    """See the module's docstring. Built with random weights; `initialization` has better ones for training."""

    positions: Tensor

    def __init__(self, config: ModelConfig, vocab_size: int) -> None:
        super().__init__()
        self.config = config
        self.vocab_size = vocab_size
        self.embedding = TiedEmbedding(vocab_size, config.dim)
        self.encoder_layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.encoder_norm = nn.LayerNorm(config.dim)
        self.decoder_layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(config.dim)
        self.register_buffer("positions", torch.empty(0), persistent=False)
        # For arithmetic on the meta device torch imports its compiler: 1.5 seconds.
        if not self.embedding.weight.is_meta:
            self.reset_positions()

    def reset_positions(self, device: torch.device | str | None = None) -> None:
        """Compute the table of positions (again), for sequences of up to max_length tokens and the start mark."""
        table = compute_positions(self.config.max_length + FIRST_POSITION + 1, self.config.dim)
        self.positions = table[FIRST_POSITION:].to(device)

    def num_parameters(self) -> int:
        """Weights of the float model, the tied matrix once, in whatever format they are now."""
        with torch.device("meta"):
            return sum(t.numel() for t in CvmTransformer(self.config, self.vocab_size).state_dict().values())

    def use_full_attention(self) -> None:
        """Drop the bound on the decoder's key/value slots (`core_capacity`); the weights stay."""
        self.config = self.config.model_copy(update={"core_capacity": None})
        for layer in self._decoder():
            layer.attention.capacity = layer.cross_attention.capacity = None

    def set_fake_quantization(self, on: bool, plan: Mapping[str, LayerFormat] | None = None) -> None:
        """Round weights and activations in every forward pass to the int8 grid, or as a plan says; or stop doing so."""
        set_fake_quantization(self, on, plan)

    def _decoder(self) -> Iterable[DecoderLayer]:
        return cast("Iterable[DecoderLayer]", self.decoder_layers)

    def _place(self, embedded: Tensor) -> Tensor:
        """Rows of the embedding matrix at their positions: (B, L, D) -> (B, L, D)."""
        x = embedded * math.sqrt(self.config.dim) + self.positions[: embedded.shape[1]]
        return dropout(x, self.config.dropout, self.training)

    def _encode(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        x = self._place(embedded)
        for layer in self.encoder_layers:
            x = layer(x, mask)
        memory: Tensor = self.encoder_norm(x)
        return memory

    def encode(self, src: Tensor, src_mask: Tensor) -> Tensor:
        """src (B, S) ids, src_mask (B, S) bool, True at real tokens -> memory (B, S, D)."""
        return self._encode(self.embedding.embed(src), _attention_mask(src_mask))

    def forward(self, src: Tensor, src_mask: Tensor, tgt_in: Tensor) -> tuple[Tensor, Tensor]:
        """Teacher-forced pass: src (B, S), src_mask (B, S) bool, tgt_in (B, T) -> hidden (B, T, D), matrix (V, D).

        Logits are hidden @ matrix.T. With fake quantisation on, both are already rounded to the grid, and the matrix is
        the one that embedded the tokens.
        """
        matrix, embedded_src, embedded_tgt = look_up(self.embedding, src, tgt_in)
        mask = _attention_mask(src_mask)
        memory = self._encode(embedded_src, mask)
        x = self._place(embedded_tgt)
        for layer in self.decoder_layers:
            x = layer(x, memory, mask)
        return self.embedding.round_hidden(self.decoder_norm(x)), matrix

    def start(self, memory: Tensor, src_mask: Tensor, beam_size: int = 1) -> DecoderState:
        """The state before the first token, for `beam_size` consecutive rows per source."""
        mask, rows = _attention_mask(src_mask), memory.shape[0] * beam_size
        sources = [layer.cross_attention.project_memory(memory, mask).contiguous() for layer in self._decoder()]
        layers = zip(self._decoder(), sources, strict=True)
        caches = [layer.attention.build_cache(rows, source.keys) for layer, source in layers]
        return DecoderState(caches, sources, self.embedding.decoding_matrix())

    def step(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """The logits (R, V) after one more token of each row, tokens (R,); moves the state on."""
        return self.embedding.project(self.advance(tokens, state), state.matrix)

    def advance(self, tokens: Tensor, state: DecoderState) -> Tensor:
        """What `step` projects to logits, (R, D)."""
        x = self.embedding.embed(tokens, state.matrix) * math.sqrt(self.config.dim) + self.positions[state.length]
        for layer, cache, source in zip(self._decoder(), state.caches, state.sources, strict=True):
            x = layer.step(x, cache, source)
        state.length += 1
        hidden: Tensor = self.decoder_norm(x)
        return hidden


def _attention_mask(src_mask: Tensor) -> Tensor | None:
    """(B, 1, 1, S), or None where nothing is padded (asked on the CPU only: elsewhere it would be a sync point, and a
    compiler could not go on)."""
    if src_mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(src_mask.all()):
        return None
    return src_mask[:, None, None, :]
