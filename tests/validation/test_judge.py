"""The gate's judge: retentions against the teacher, gaps told apart, failures with by how much."""

from __future__ import annotations

import json

import pytest

from cvm_translator.validation.judge import judge_models


def judge(corpus, config, evaluator, float_errors: float, int8_errors: float):
    return judge_models(
        config,
        corpus.sources,
        corpus.references,
        corpus.translator(0.2, 1),
        {"float": corpus.translator(float_errors, 1), "int8": corpus.translator(int8_errors, 1)},
        gated="int8",
        evaluator=evaluator,
    )


def test_a_student_like_its_teacher_passes(corpus, config, evaluator) -> None:
    judgement = judge(corpus, config, evaluator, 0.2, 0.21)
    assert judgement.passed
    report = json.loads(json.dumps(judgement.report))
    assert report["gate"]["failures"] == []
    assert report["models"]["float"]["retentions"]["quality"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    retention = report["models"]["int8"]["retentions"]["bleu"]
    scores = report["models"]["int8"]["scores"]
    assert retention["value"] == pytest.approx(scores["bleu"] / report["teacher"]["scores"]["bleu"])
    assert retention["low"] < retention["value"] < retention["high"]
    assert judgement.hypotheses["int8"] == corpus.translator(0.21, 1)(corpus.sources)


def test_a_bad_student_fails_and_the_report_says_by_how_much(corpus, config, evaluator) -> None:
    gate = judge(corpus, config, evaluator, 0.2, 0.6).report["gate"]
    assert not gate["passed"]
    assert [requirement["name"] for requirement in gate["requirements"]] == ["quality", "bleu", "chrf"]
    bleu = gate["requirements"][1]["retention"]["value"]
    assert (
        f"BLEU keeps {bleu:.1%} of the teacher's, {0.9 - bleu:.1%} short of guard.quality_threshold 90.0%"
        in (gate["failures"])
    )


def test_the_gaps_are_told_apart_and_add_up(corpus, config, evaluator) -> None:
    report = judge(corpus, config, evaluator, 0.3, 0.35).report
    first, second = report["gaps"]
    assert (first["from"], first["to"], second["from"], second["to"]) == ("teacher", "float", "float", "int8")
    total = 1 - report["models"]["int8"]["retentions"]["quality"]["value"]
    assert first["quality_loss"]["value"] + second["quality_loss"]["value"] == pytest.approx(total)
    assert first["quality_loss"]["p_value"] < 0.05
    assert first["score_differences"]["chrf"]["value"] < 0


def test_a_worthless_teacher_cannot_pass_anyone(corpus, config, evaluator) -> None:
    judgement = judge_models(
        config,
        corpus.sources,
        corpus.references,
        lambda sources: [source.replace(" ", "") for source in sources],
        {"int8": corpus.translator(0.2)},
        gated="int8",
        evaluator=evaluator,
    )
    assert not judgement.passed
    assert "BLEU: the teacher itself scores 0" in judgement.report["gate"]["failures"][0]


def test_the_gated_model_must_be_there(corpus, config, evaluator) -> None:
    with pytest.raises(ValueError, match="'int4' is not among int8"):
        judge_models(config, ["a"], ["b"], list, {"int8": list}, gated="int4", evaluator=evaluator)
