"""COMET (Rei et al. 2022), an optional extra: a trained judge that reads source, hypothesis and reference.

Refuses to be built without the library (the error names the extra); never falls back to another number. Scores are on
COMET's own scale, about 0..1.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from cvm_translator.errors import import_optional
from cvm_translator.metrics.base import FloatArray, MeanMetric, check_finite, check_pairs


class Comet(MeanMetric):
    name = "comet"
    scale = 1.0

    def __init__(self, model: str = "Unbabel/wmt22-comet-da", device: str = "cpu", batch_size: int = 32) -> None:
        library = import_optional("comet", "comet")
        checkpoint = model if Path(model).is_file() else library.download_model(model)
        self._model = library.load_from_checkpoint(checkpoint)
        self._model_name = model
        self._num_gpus = 1 if device.startswith("cuda") else 0
        self._batch_size = batch_size

    def signature(self) -> str:
        return f"comet|model:{self._model_name}|unbabel-comet:{version('unbabel-comet')}"

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str] | None = None
    ) -> FloatArray:
        check_pairs(hypotheses, references)
        if sources is None:
            raise ValueError("comet needs the sources as well")
        samples = [
            {"src": source, "mt": hypothesis, "ref": reference}
            for source, hypothesis, reference in zip(sources, hypotheses, references, strict=True)
        ]
        output = self._model.predict(samples, batch_size=self._batch_size, gpus=self._num_gpus, progress_bar=False)
        return check_finite(self.name, self.as_statistics(np.asarray(output.scores, dtype=np.float64)))
