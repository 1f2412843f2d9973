"""The evaluator: scores equal those of the metrics, a failing metric has no score and a reason."""

from __future__ import annotations

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from cvm_translator.config.schema import ValidationSettings
from cvm_translator.errors import MissingDependencyError
from cvm_translator.validation import TranslationQualityEvaluator, ValidationConfig
from cvm_translator.validation.evaluator import compute_set_sha256


def test_scores_statistics_and_probes_of_every_sentence(corpus, evaluator) -> None:
    hypotheses = corpus.translator(0.3)(corpus.sources)
    hypotheses[0] = ""
    measurement = evaluator.evaluate(corpus.sources, hypotheses, corpus.references)
    assert set(measurement.scores) == {"bleu", "chrf", "ter", "rouge1", "rouge2", "rougeL", "exact_match"}
    assert measurement.scores["bleu"] == pytest.approx(BLEU().corpus_score(hypotheses, [corpus.references]).score)
    assert all(len(rows) == len(hypotheses) for rows in measurement.statistics.values())
    assert measurement.probe_counts["empty"] == 1
    assert measurement.probes["empty"][0]
    assert measurement.signatures["ter"].startswith("ter|nrefs:1|case:lc|tok:tercom")
    assert not measurement.failures


def test_the_set_hash_depends_on_every_pair_and_their_order(corpus) -> None:
    sources, references = corpus.sources, corpus.references
    original = compute_set_sha256(sources, references)
    assert compute_set_sha256(sources[::-1], references[::-1]) != original
    assert compute_set_sha256(["ab"], ["c"]) != compute_set_sha256(["a"], ["bc"])
    assert compute_set_sha256(list(sources), list(references)) == original


def test_a_crashing_or_nan_metric_has_a_reason_and_no_score(corpus, config) -> None:
    evaluator = TranslationQualityEvaluator(config)
    by_name = {metric.name: metric for metric in evaluator.metrics}

    def crash(*_args: object) -> None:
        raise RuntimeError("the library gave up")

    by_name["chrf"].statistics = crash
    by_name["ter"].score = lambda aggregate: np.asarray(np.nan)
    # BLEU's brevity penalty makes a finite score of them; what is resampled from them is no number.
    by_name["bleu"].statistics = lambda hypotheses, *_: np.full((len(hypotheses), 10), np.inf)
    measurement = evaluator.evaluate(corpus.sources, corpus.references, corpus.references)
    assert measurement.failures == {
        "bleu": "ValueError: bleu is not a number for sentence 1",
        "chrf": "RuntimeError: the library gave up",
        "ter": "ValueError: ter is nan",
    }
    assert not measurement.failures.keys() & (measurement.scores.keys() | measurement.statistics.keys())
    assert measurement.scores["rougeL"] == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("hypotheses", "share"), [(["", "x y"], 0.5), (["a b a b a b a b", ""], 1.0), (["one two", "three"], 0.0)]
)
def test_collapsed_share(evaluator, hypotheses, share) -> None:
    assert evaluator.evaluate(["s", "t"], hypotheses, ["u v", "w"]).collapsed_share == share


def test_unequal_lists_are_refused(evaluator) -> None:
    with pytest.raises(ValueError, match="1 sources, 2 hypotheses and 1 references"):
        evaluator.evaluate(["a"], ["b", "c"], ["d"])


def test_a_missing_library_is_refused_before_anything_is_decoded(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "comet", None)
    config = ValidationConfig(settings=ValidationSettings(metrics=["bleu", "chrf", "comet"]))
    with pytest.raises(MissingDependencyError, match=r"cvm-translator\[comet\]"):
        TranslationQualityEvaluator(config)


def test_a_language_the_identifier_does_not_know_has_no_such_probe() -> None:
    settings = ValidationSettings(metrics=["bleu", "chrf"])
    evaluator = TranslationQualityEvaluator(ValidationConfig(settings=settings, target_language="xx"))
    assert "wrong_language" not in evaluator.evaluate(["a"], ["b"], ["c"]).probes
