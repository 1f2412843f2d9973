"""BLEU, chrF, TER and exact match against sacreBLEU's own corpus scores, and tables of known sentences."""

from __future__ import annotations

import random

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF, TER

from cvm_translator.metrics import METRICS, MetricOptions, build_metrics
from cvm_translator.metrics.base import check_finite
from cvm_translator.metrics.surface import Bleu, Chrf, ExactMatch, Ter

REFERENCES = [
    "The file was not found.",
    "Open the window, please.",
    "Save %(name)s now?",
    "It costs 1,000.50 dollars.",
    "Yes",
    "A considerably longer sentence that speaks of nothing in particular, but takes its time.",
]
CORPORA = {
    "identical": REFERENCES,
    "all empty": [""] * len(REFERENCES),
    "one empty": ["", *REFERENCES[1:]],
    "single words": ["file", "window", "save", "dollars", "no", "sentence"],
    "no word in common": ["xyz abc"] * len(REFERENCES),
    "close": [
        "File was not found.",
        "Please open the window.",
        "Save %(name)s now",
        "It costs 1000 dollars.",
        "No",
        "A much longer sentence that speaks about nothing in particular but takes a lot of its time, really.",
    ],
}
ORACLES = {"bleu": BLEU(force=True), "chrf": CHRF(), "ter": TER()}


def noisy_corpus(seed: int, size: int) -> tuple[list[str], list[str]]:
    generator = random.Random(seed)
    text = "the a file not found open window save name error 42 server , . connection lost"
    words = text.split()
    references = [" ".join(generator.choices(words, k=generator.randint(1, 14))) for _ in range(size)]
    hypotheses = [
        " ".join(word if generator.random() < 0.7 else generator.choice(words) for word in reference.split())
        for reference in references
    ]
    return hypotheses, references


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("corpus", CORPORA)
def test_corpus_score_equals_sacrebleu(name: str, corpus: str) -> None:
    (metric,) = build_metrics([name])
    statistics = metric.statistics(CORPORA[corpus], REFERENCES)
    expected = ORACLES[name].corpus_score(CORPORA[corpus], [REFERENCES]).score
    assert float(metric.score(statistics.sum(axis=0))) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", ORACLES)
def test_vectorised_score_equals_sacrebleu_on_every_resampled_corpus(name: str) -> None:
    hypotheses, references = noisy_corpus(1, 60)
    (metric,) = build_metrics([name])
    statistics = metric.statistics(hypotheses, references)
    generator = np.random.default_rng(2)
    picks = [generator.integers(60, size=size) for size in (1, 2, 5, 60, 60)]
    aggregates = np.stack([statistics[pick].sum(axis=0) for pick in picks])
    expected = [
        ORACLES[name].corpus_score([hypotheses[i] for i in pick], [[references[i] for i in pick]]).score
        for pick in picks
    ]
    np.testing.assert_allclose(metric.score(aggregates), expected, atol=1e-9)
    np.testing.assert_allclose(metric.score(aggregates.reshape(5, 1, -1))[:, 0], expected, atol=1e-9)


def test_references_may_change_between_calls() -> None:
    hypotheses, references = noisy_corpus(3, 10)
    metric = Chrf()
    first = metric.statistics(hypotheses, references)
    metric.statistics(hypotheses, references[::-1])
    np.testing.assert_array_equal(metric.statistics(hypotheses, references), first)


def test_remembered_edits_are_the_same_as_fresh_ones() -> None:
    hypotheses, references = noisy_corpus(4, 20)
    metric = Ter()
    first = metric.statistics(hypotheses, references)
    np.testing.assert_array_equal(metric.statistics(hypotheses, references), first)
    np.testing.assert_array_equal(metric.statistics(hypotheses[::-1], references[::-1]), first[::-1])


@pytest.mark.parametrize(
    ("hypotheses", "references", "expected"),
    [
        (["a", "b"], ["a", "b"], 100.0),
        (["a", "b "], ["a", "b"], 100.0),
        (["a", "B"], ["a", "b"], 50.0),
        (["", "x"], ["a", "b"], 0.0),
    ],
)
def test_exact_match(hypotheses: list[str], references: list[str], expected: float) -> None:
    metric = ExactMatch()
    assert float(metric.score(metric.statistics(hypotheses, references).sum(axis=0))) == expected


@pytest.mark.parametrize(
    ("metric", "score", "value"),
    [(Bleu(), 25.0, 0.25), (Chrf(), 50.0, 0.5), (Ter(), 30.0, 0.7), (Ter(), 140.0, 0.0), (ExactMatch(), 10.0, 0.1)],
)
def test_retention_value_is_higher_for_better_and_zero_for_worthless(metric, score: float, value: float) -> None:
    assert float(metric.retention_value(np.asarray(score))) == pytest.approx(value)


def test_signatures_are_those_of_sacrebleu() -> None:
    oracle = BLEU(force=True)
    oracle.corpus_score(["a"], [["a"]])
    assert Bleu().signature() == f"bleu|{oracle.get_signature()}"
    assert "tok:13a|smooth:exp" in Bleu().signature()
    assert "tok:zh" in Bleu("zh").signature()


def test_unequal_lists_and_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="2 hypotheses do not match 1 references"):
        Bleu().statistics(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="no sentences"):
        Chrf().statistics([], [])
    with pytest.raises(ValueError, match="unknown metric 'bleurt'; known: bleu, chrf"):
        build_metrics(["bleurt"])


def test_nan_is_refused_with_the_sentence() -> None:
    with pytest.raises(ValueError, match="demo is not a number for sentence 2"):
        check_finite("demo", np.array([[1.0, 1.0], [np.nan, 1.0]]))


def test_rouge_is_three_metrics_and_every_name_of_the_config_is_known() -> None:
    assert [metric.name for metric in build_metrics(["rouge"], MetricOptions())] == ["rouge1", "rouge2", "rougeL"]
    assert set(METRICS) == {"bleu", "chrf", "ter", "rouge", "bertscore", "comet", "exact_match"}
