"""Strings in, numbers out: metrics with per-sentence statistics, the bootstrap over them, and degeneration probes.

`METRICS` maps the names that a config may use to what they compute; `build_metrics` refuses unknown names and, through
each metric's constructor, missing libraries.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cvm_translator.errors import MissingDependencyError
from cvm_translator.metrics.base import Metric
from cvm_translator.metrics.bertscore import BertScore
from cvm_translator.metrics.comet import Comet
from cvm_translator.metrics.rouge import ROUGE_TYPES, Rouge
from cvm_translator.metrics.surface import Bleu, Chrf, ExactMatch, Ter

__all__ = ["METRICS", "ROUGE_TYPES", "Metric", "MetricOptions", "build_metrics", "require_libraries"]


@dataclass(frozen=True)
class MetricOptions:
    """What metrics need to know beyond the texts."""

    target_language: str = ""
    bertscore_model: str | None = None
    bertscore_layer: int | None = None
    comet_model: str = "Unbabel/wmt22-comet-da"
    device: str = "cpu"


METRICS: dict[str, Callable[[MetricOptions], list[Metric]]] = {
    "bleu": lambda options: [Bleu(options.target_language)],
    "chrf": lambda options: [Chrf()],
    "ter": lambda options: [Ter()],
    "rouge": lambda options: [Rouge(rouge_type) for rouge_type in ROUGE_TYPES],
    "bertscore": lambda options: [BertScore(options.bertscore_model, options.bertscore_layer, options.device)],
    "comet": lambda options: [Comet(options.comet_model, options.device)],
    "exact_match": lambda options: [ExactMatch()],
}

LIBRARIES = {
    "bleu": ("sacrebleu", "metrics"),
    "chrf": ("sacrebleu", "metrics"),
    "ter": ("sacrebleu", "metrics"),
    "rouge": ("rouge_score", "metrics"),
    "bertscore": ("bert_score", "metrics"),
    "comet": ("comet", "comet"),
}
"""What computes a metric, and the extra that installs it."""


def require_libraries(names: Sequence[str]) -> None:
    """Raise MissingDependencyError where a metric's library is not installed; nothing is imported for it."""
    for name in names:
        library, extra = LIBRARIES.get(name, ("", ""))
        if library and not _is_installed(library):
            raise MissingDependencyError(
                f"validation.metrics names {name}, but {library} is not installed: install it with pip install"
                f" 'cvm-translator[{extra}]', or leave {name} out"
            )


def _is_installed(library: str) -> bool:
    return library in sys.modules or importlib.util.find_spec(library) is not None


def build_metrics(names: Sequence[str], options: MetricOptions | None = None) -> list[Metric]:
    """The metrics of these names, in order; `rouge` gives three."""
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {unknown[0]!r}; known: {', '.join(METRICS)}")
    options = options or MetricOptions()
    return [metric for name in dict.fromkeys(names) for metric in METRICS[name](options)]
