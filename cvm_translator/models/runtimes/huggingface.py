"""Transformers, on folders that `export --format huggingface` wrote."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cvm_translator.errors import ModelError, import_optional
from cvm_translator.models.decoding import pad_sources
from cvm_translator.models.runtimes.base import Runtime, RuntimeSettings, cut_batches, limit_output, load_export_facts
from cvm_translator.models.transformer import EOS_ID


class _AutoTokenizer:
    """The folder's own tokenizer, with ids as the native one gives them: without end mark."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:
            return []
        rows: list[list[int]] = self._tokenizer(list(texts), verbose=False)["input_ids"]
        assert all(row[-1] == EOS_ID for row in rows)
        return [row[:-1] for row in rows]

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        return list(self._tokenizer.batch_decode(list(ids), skip_special_tokens=True)) if ids else []


class HuggingFaceRuntime(Runtime):
    """AutoModelForSeq2SeqLM and AutoTokenizer."""

    def __init__(self, path: Path, settings: RuntimeSettings) -> None:
        self.facts = load_export_facts(path, "huggingface")
        library = import_optional("transformers", "huggingface")
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        library.utils.logging.disable_progress_bar()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Recommended: pip install sacremoses")
                tokenizer = library.AutoTokenizer.from_pretrained(path)
            self.model = library.AutoModelForSeq2SeqLM.from_pretrained(path).to(settings.device).eval()
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"{path} cannot be loaded by Transformers ({error}): export the model again") from error
        self.tokenizer = _AutoTokenizer(tokenizer)
        self.num_bytes = (path / "model.safetensors").stat().st_size

    def translate_ids(
        self, sources: Sequence[Sequence[int]], *, beam_size: int = 1, batch_size: int = 128
    ) -> list[list[int]]:
        results: list[list[int]] = [[] for _ in sources]
        for chosen in cut_batches(sources, batch_size // beam_size):
            limits = [limit_output(len(sources[i]), self.facts["max_length"]) for i in chosen]
            src, mask = pad_sources([sources[i] for i in chosen], self.model.device)
            outputs = self.model.generate(
                input_ids=src,
                attention_mask=mask.long(),
                max_length=max(limits) + 1,  # the start mark counts
                num_beams=beam_size,
            )
            for i, limit, output in zip(chosen, limits, outputs.tolist(), strict=True):
                tokens = output[1 : limit + 1]
                results[i] = tokens[: tokens.index(EOS_ID)] if EOS_ID in tokens else tokens
        return results
