"""This program's own runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.corpus.records import Pair
from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.errors import ModelError
from cvm_translator.models.decoding import translate_ids
from cvm_translator.models.description import WEIGHTS_FILE
from cvm_translator.models.folder import find_model_folder, load_model
from cvm_translator.models.packing import pack_layers
from cvm_translator.models.perplexity import measure_reference_losses
from cvm_translator.models.runtimes.base import Runtime, RuntimeSettings
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.quantization import QuantizableLinear, TiedEmbedding

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class NativeRuntime(Runtime):
    """A model folder; of a run's `student` folder, the deployed one (int8, else float)."""

    tokenizer: Tokenizer

    def __init__(self, path: Path, settings: RuntimeSettings) -> None:
        if settings.num_threads is not None:
            torch.set_num_threads(settings.num_threads)
        loaded = load_model(path, settings.device)
        self._model, self.tokenizer = loaded.model, loaded.tokenizer
        if settings.precision not in PRECISIONS:
            raise ModelError(f"unknown precision {settings.precision!r}: known are {', '.join(PRECISIONS)}")
        if settings.precision != "float32":
            if (held := loaded.config["number_format"]) != "float32":
                raise ModelError(
                    f"{find_model_folder(path)} is {held}, which computes in its own precision: name the float model"
                    " (in a run: student/float) or leave --precision out"
                )
            _multiply_in(PRECISIONS[settings.precision], self._model)
        pack_layers(self._model)
        self.facts = {
            "format": "safetensors",
            "number_format": loaded.config["number_format"],
            "max_length": loaded.model.config.max_length,
            "num_parameters": loaded.model.num_parameters(),
            "source_language": loaded.config["source_language"],
            "target_language": loaded.config["target_language"],
        }
        self.num_bytes = (find_model_folder(path) / WEIGHTS_FILE).stat().st_size

    def translate_ids(
        self, sources: Sequence[Sequence[int]], *, beam_size: int = 1, batch_size: int = 128
    ) -> list[list[int]]:
        return translate_ids(self._model, sources, beam_size=beam_size, batch_size=batch_size)

    def measure_references(self, pairs: Sequence[Pair], batch_size: int = 128) -> list[list[float]]:
        held_out = DistillationDataset.from_pairs(pairs, self.tokenizer, self._model.config.max_length)
        losses: list[list[float]] = measure_reference_losses(self._model, held_out, len(pairs), batch_size).tolist()
        return losses


def _multiply_in(dtype: torch.dtype, model: CvmTransformer) -> None:
    """Have matrix products in a type; norms and what layers add up stay float32, as they were in training."""
    for layer in model.modules():
        if isinstance(layer, QuantizableLinear | TiedEmbedding):
            layer.to(dtype)
