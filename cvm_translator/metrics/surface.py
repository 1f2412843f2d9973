"""BLEU, chrF, TER and exact match: metrics of the surface text.

Guarantees: the per-sentence counts come from sacreBLEU's own metric objects, and the corpus scores computed here from
their sums equal sacreBLEU's `corpus_score` with one reference (BLEU: tokeniser 13a or the target language's own,
exponential smoothing; chrF: 6 character orders, beta 2; TER: tercom, lower-cased). Scores are on 0..100; TER may exceed
100.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cvm_translator.errors import MissingDependencyError, import_optional
from cvm_translator.metrics.base import FloatArray, MeanMetric, check_finite, check_pairs

MAX_CACHED_PAIRS = 100_000


class _SacreBleuMetric:
    """Statistics through a sacreBLEU metric object; the references' n-grams are kept between calls."""

    name = ""

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        self._metric.num_refs = 1
        self._references: list[str] = []

    def signature(self) -> str:
        return f"{self.name}|{self._metric.get_signature()}"

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str] | None = None
    ) -> FloatArray:
        check_pairs(hypotheses, references)
        if self._references != list(references):
            self._metric._ref_cache = self._metric._cache_references([list(references)])
            self._references = list(references)
        rows = self._metric._extract_corpus_statistics(list(hypotheses), None)
        return check_finite(self.name, np.asarray(rows, dtype=np.float64))

    def retention_value(self, score: FloatArray) -> FloatArray:
        return np.asarray(score, dtype=np.float64) / 100.0


class Bleu(_SacreBleuMetric):
    """Papineni et al. 2002, as sacreBLEU (Post 2018) computes it."""

    name = "bleu"

    def __init__(self, target_language: str = "") -> None:
        sacrebleu = import_optional("sacrebleu.metrics", "metrics")
        try:
            super().__init__(sacrebleu.BLEU(trg_lang=target_language, force=True))
        except (ImportError, RuntimeError) as error:  # Japanese and Korean tokenisers are extras of sacreBLEU
            raise MissingDependencyError(
                f"BLEU for target language {target_language!r} needs a tokeniser that is not installed ({error}): "
                f"install it with pip install 'sacrebleu[{target_language}]'"
            ) from error

    def score(self, aggregate: FloatArray) -> FloatArray:
        """(..., 10): hypothesis length, reference length, matched 1..4-grams, all 1..4-grams."""
        hypothesis_length, reference_length = aggregate[..., 0], aggregate[..., 1]
        correct, total = aggregate[..., 2:6], aggregate[..., 6:10]  # (..., 4)
        unmatched = (correct == 0) & (total > 0)
        smoothed = np.where(unmatched, 0.5 ** np.cumsum(unmatched, axis=-1), correct)
        with np.errstate(divide="ignore", invalid="ignore"):
            log_precision = np.log(smoothed / total).mean(axis=-1)
            brevity = np.minimum(0.0, 1.0 - reference_length / hypothesis_length)
            scores = 100.0 * np.exp(log_precision + brevity)
        # No match of any order, or no n-gram of some order at all: 0 by definition.
        defined = (correct > 0).any(axis=-1) & (total > 0).all(axis=-1)
        return np.asarray(np.where(defined, scores, 0.0), dtype=np.float64)


class Chrf(_SacreBleuMetric):
    """Popović 2015 with beta 2 (chrF2), as sacreBLEU computes it (effective order, no word n-grams)."""

    name = "chrf"
    beta_squared = 4.0

    def __init__(self) -> None:
        super().__init__(import_optional("sacrebleu.metrics", "metrics").CHRF())

    def score(self, aggregate: FloatArray) -> FloatArray:
        """(..., 18): hypothesis, reference and matched n-grams for each of the six character orders."""
        counts = aggregate.reshape(*aggregate.shape[:-1], -1, 3)  # (..., 6, 3)
        in_hypothesis, in_reference, matched = counts[..., 0], counts[..., 1], counts[..., 2]
        effective = (in_hypothesis > 0) & (in_reference > 0)
        orders = np.maximum(1, effective.sum(axis=-1))
        precision = (matched / np.where(effective, in_hypothesis, np.inf)).sum(axis=-1) / orders
        recall = (matched / np.where(effective, in_reference, np.inf)).sum(axis=-1) / orders
        denominator = self.beta_squared * precision + recall
        f_score = (1 + self.beta_squared) * precision * recall / np.where(denominator > 0, denominator, 1.0)
        return np.asarray(100.0 * f_score, dtype=np.float64)


class Ter(_SacreBleuMetric):
    """Snover et al. 2006, as sacreBLEU computes it. Lower is better. Its alignment search is slow Python, so the
    edits of a pair already seen are remembered (most sentences do not change between two validations)."""

    name = "ter"

    def __init__(self) -> None:
        super().__init__(import_optional("sacrebleu.metrics", "metrics").TER())
        self._edits: dict[tuple[str, str], list[float]] = {}

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str] | None = None
    ) -> FloatArray:
        check_pairs(hypotheses, references)
        pairs = list(zip(hypotheses, references, strict=True))
        fresh = [pair for pair in dict.fromkeys(pairs) if pair not in self._edits]
        if len(self._edits) + len(fresh) > MAX_CACHED_PAIRS:
            self._edits.clear()
            fresh = list(dict.fromkeys(pairs))
        if fresh:
            rows = self._metric._extract_corpus_statistics(
                [hypothesis for hypothesis, _ in fresh], [[reference for _, reference in fresh]]
            )
            self._edits.update(zip(fresh, rows, strict=True))
        return check_finite(self.name, np.asarray([self._edits[pair] for pair in pairs], dtype=np.float64))

    def score(self, aggregate: FloatArray) -> FloatArray:
        """(..., 2): edits, reference words."""
        edits, words = aggregate[..., 0], aggregate[..., 1]
        rate = np.where(words > 0, edits / np.where(words > 0, words, 1.0), (edits > 0).astype(np.float64))
        return np.asarray(100.0 * rate, dtype=np.float64)

    def retention_value(self, score: FloatArray) -> FloatArray:
        return np.asarray(np.maximum(0.0, 1.0 - np.asarray(score) / 100.0), dtype=np.float64)


class ExactMatch(MeanMetric):
    """Percentage of hypotheses that equal their reference, spaces at the ends aside."""

    name = "exact_match"

    def signature(self) -> str:
        return "exact_match|case:mixed|ends:stripped"

    def statistics(
        self, hypotheses: Sequence[str], references: Sequence[str], sources: Sequence[str] | None = None
    ) -> FloatArray:
        check_pairs(hypotheses, references)
        return self.as_statistics(
            [
                float(hypothesis.strip() == reference.strip())
                for hypothesis, reference in zip(hypotheses, references, strict=True)
            ]
        )
