"""Error analysis: buckets that add up, categories that change, worst sentences that are the worst."""

from __future__ import annotations

import pytest

from cvm_translator.validation.analysis import LENGTH_BUCKETS, analyse_errors, bucket_name


@pytest.fixture
def analysed(corpus, evaluator):
    hypotheses = corpus.translator(0.2)(corpus.sources)
    hypotheses[5] = ""
    hypotheses[6] = corpus.references[6] * 3
    teacher_hypotheses = corpus.translator(0.1, 8)(corpus.sources)
    measurement = evaluator.evaluate(corpus.sources, hypotheses, corpus.references)
    teacher = evaluator.evaluate(corpus.sources, teacher_hypotheses, corpus.references)
    metrics = {metric.name: metric for metric in evaluator.metrics}
    analysis = analyse_errors(
        metrics, measurement, corpus.sources, hypotheses, corpus.references, teacher, teacher_hypotheses,
        {"empty": 3, "numbers": 0},
    )  # fmt: skip
    return analysis, hypotheses, teacher_hypotheses


def test_buckets_cover_every_sentence_once(corpus, evaluator, analysed) -> None:
    rows = analysed[0]["scores_by_length"]
    assert sum(row["num_sentences"] for row in rows) == len(corpus.sources)
    known = [bucket_name(bucket) for bucket in LENGTH_BUCKETS]
    assert [row["bucket"] for row in rows] == [name for name in known if name in {row["bucket"] for row in rows}]
    row = next(row for row in rows if row["bucket"] == "4-8 words")
    chosen = [i for i, source in enumerate(corpus.sources) if 4 <= len(source.split()) <= 8]
    expected = evaluator.evaluate(
        [corpus.sources[i] for i in chosen], [analysed[1][i] for i in chosen], [corpus.references[i] for i in chosen]
    )
    assert row["num_sentences"] == len(chosen)
    assert row["scores"] == pytest.approx(expected.scores)
    assert row["teacher_scores"]["chrf"] > row["scores"]["chrf"]


def test_categories_and_their_change(corpus, analysed) -> None:
    analysis, hypotheses, teacher_hypotheses = analysed
    counts = analysis["error_counts"]
    assert counts["empty"] == 1
    assert counts["over_translation"] >= 1
    assert counts["differs_from_teacher"] == sum(a != b for a, b in zip(hypotheses, teacher_hypotheses, strict=True))
    assert analysis["error_changes"] == {"empty": -2, "numbers": counts["numbers"]}


def test_the_worst_sentences_come_first_with_all_four_texts(corpus, analysed) -> None:
    analysis, _, teacher_hypotheses = analysed
    worst = analysis["worst_sentences"]
    assert [entry["chrf"] for entry in worst] == sorted(entry["chrf"] for entry in worst)
    first = next(entry for entry in worst if entry["sentence"] == 6)
    assert first["student"] == ""
    assert "empty" in first["errors"]
    assert first["source"] == corpus.sources[5]
    assert first["reference"] == corpus.references[5]
    assert first["teacher"] == teacher_hypotheses[5]
    losses = [entry["teacher_chrf"] - entry["chrf"] for entry in analysis["largest_losses"]]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] > 0  # a sentence that lost nothing is no loss


def test_without_a_teacher_there_is_no_comparison(corpus, evaluator) -> None:
    measurement = evaluator.evaluate(corpus.sources, corpus.references, corpus.references)
    metrics = {metric.name: metric for metric in evaluator.metrics}
    analysis = analyse_errors(metrics, measurement, corpus.sources, corpus.references, corpus.references)
    assert "largest_losses" not in analysis
    assert "differs_from_teacher" not in analysis["error_counts"]
    assert analysis["error_changes"] == {}
