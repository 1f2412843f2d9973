"""A folder that Transformers loads with AutoModelForSeq2SeqLM and AutoTokenizer.

The model is M2M100's, weight for weight. The tokenizer is MarianTokenizer over the same SentencePiece model: M2M100's
own would add language codes. `split_special_tokens` keeps text such as `</s>` text, and `generation_config.json`
decodes as the native runtime does: greedily, without bos, pad and unk.

Two habits of MarianTokenizer cannot be set: it takes `>>…<<` at the very start of a text for a language code, and it
does not compose characters (NFC), which text from some file systems needs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.errors import ModelError
from cvm_translator.models.huggingface import to_m2m100
from cvm_translator.models.transformer import BOS_ID, EOS_ID, PAD_ID, UNK_ID, CvmTransformer

LOGITS_TOLERANCE = 1e-4
"""For logits up to 10, and as large a share of larger ones."""

TIED_NAMES = ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight")
"""Copies of model.shared.weight, made again when the model is loaded."""


def write_huggingface(folder: Path, model: CvmTransformer, tokenizer: Tokenizer) -> None:
    """Write model and tokenizer into an existing folder; the model must be float32."""
    arguments, weights = to_m2m100(model)
    special = {
        name: tokenizer.id_to_piece(index)
        for name, index in (("bos_token", BOS_ID), ("pad_token", PAD_ID), ("eos_token", EOS_ID), ("unk_token", UNK_ID))
    }
    max_length = model.config.max_length
    files: dict[str, Any] = {
        "config.json": {"architectures": ["M2M100ForConditionalGeneration"], "model_type": "m2m_100"}
        | arguments
        | {"dtype": "float32", "tokenizer_class": "MarianTokenizer"},
        "generation_config.json": {
            "bos_token_id": BOS_ID,
            "pad_token_id": PAD_ID,
            "eos_token_id": EOS_ID,
            "decoder_start_token_id": EOS_ID,
            "suppress_tokens": [BOS_ID, PAD_ID, UNK_ID],
            "max_length": max_length,
            "num_beams": 1,
            "do_sample": False,
        },
        "tokenizer_config.json": special
        | {
            "tokenizer_class": "MarianTokenizer",
            "model_max_length": max_length,
            "separate_vocabs": False,
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
        },
        "special_tokens_map.json": special,
        "vocab.json": {tokenizer.id_to_piece(index): index for index in range(tokenizer.vocab_size)},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for name in ("source.spm", "target.spm"):
        shutil.copyfile(tokenizer.path, folder / name)
    kept: dict[str, Tensor] = {name: tensor.contiguous() for name, tensor in weights.items() if name not in TIED_NAMES}
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(kept, metadata={"format": "pt"}))


@torch.inference_mode()
def check_logits(folder: Path, model: CvmTransformer) -> float:
    """The largest difference between Transformers' logits and the native ones on random ids; raises ModelError if it is
    no rounding error."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    twin = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    generator = torch.Generator().manual_seed(0)
    length = min(32, model.config.max_length)
    src, tgt = torch.randint(UNK_ID + 1, model.vocab_size, (2, 4, length), generator=generator)
    mask = torch.arange(length)[None] < torch.tensor([[length], [length // 2], [3], [1]])
    src = src.masked_fill(~mask, PAD_ID)
    hidden, matrix = model(src, mask, tgt)
    ours = hidden @ matrix.T
    theirs = twin(input_ids=src, attention_mask=mask.long(), decoder_input_ids=tgt).logits
    difference = float((ours - theirs).abs().max())
    if not difference <= LOGITS_TOLERANCE * max(1.0, float(ours.abs().max()) / 10):
        raise ModelError(
            f"Transformers {transformers.__version__} computes other logits than the native model (difference "
            f"{difference:.2g}), so the export is not written: use another version of it"
        )
    return difference
