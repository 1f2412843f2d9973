"""The validator: the files it leaves, the teacher decoded once, and a process that goes on where another stopped."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from cvm_translator.config.schema import RunConfig, ValidationSettings
from cvm_translator.errors import CorpusError, RunFolderError
from cvm_translator.validation import DistillationValidator, ValidationConfig, ValidationResult
from cvm_translator.validation.files import ValidationFiles, escape_line, read_hypotheses, unescape_line


@pytest.fixture
def validator(tmp_path, corpus, config, evaluator) -> DistillationValidator:
    validator = DistillationValidator(
        config, tmp_path, corpus.sources, corpus.references, evaluator, lambda texts: sum(len(t.split()) for t in texts)
    )
    validator.score_teacher(corpus.translator(0.2, 9), "teacher-hash")
    return validator


def must_not_decode(sources: list[str]) -> list[str]:
    raise AssertionError("decoded again")


def test_a_validation_leaves_its_files(tmp_path, corpus, validator) -> None:
    result = validator.validate(1000, 1, corpus.translator(0.3), {"perplexity": 5.5})
    record = json.loads((tmp_path / "step_1000.json").read_text())
    assert ValidationResult.from_json(record) == replace(result, measurement=None)
    assert record["set_sha256"] == validator.set_sha256
    assert record["scores"]["bleu"] == result.scores["bleu"]
    assert record["extra"] == {"perplexity": 5.5}
    assert read_hypotheses(tmp_path / "step_1000.hypotheses.txt") == corpus.translator(0.3)(corpus.sources)
    low, high = result.intervals["chrf"]
    assert low < result.scores["chrf"] < high
    assert result.quality_score == pytest.approx(float(validator.detector.scale.quality(result.scores)))
    assert result.decode_tokens_per_second > 0


def test_after_a_rollback_names_carry_the_attempt(tmp_path, corpus, validator) -> None:
    validator.validate(1000, 1, corpus.translator(0.3))
    validator.validate(1000, 2, corpus.translator(0.4))
    assert (tmp_path / "step_1000.json").exists()
    assert (tmp_path / "step_1000.attempt_2.hypotheses.txt").exists()


def test_a_result_is_compared_with_previous_best_and_teacher(corpus, validator) -> None:
    first = validator.validate(1000, 1, corpus.translator(0.3))
    assert set(first.comparisons) == {"teacher"}
    validator.validate(2000, 1, corpus.translator(0.5))
    third = validator.validate(3000, 1, corpus.translator(0.31))
    assert third.comparisons["previous"]["step"] == 2000
    assert third.comparisons["best"]["step"] == 1000
    bleu = third.comparisons["previous"]["metrics"]["bleu"]
    assert bleu["difference"] == pytest.approx(bleu["score"] - bleu["other_score"])
    assert bleu["p_value"] < 0.05
    assert bleu["interval"][0] > 0
    assert third.comparisons["best"]["metrics"]["bleu"]["p_value"] > 0.05


def test_the_teacher_is_decoded_once(tmp_path, corpus, config, evaluator, validator) -> None:
    again = DistillationValidator(config, tmp_path, corpus.sources, corpus.references, evaluator)
    record = again.score_teacher(must_not_decode, "teacher-hash")
    assert again.teacher.scores == validator.teacher.scores == record["scores"]
    assert again.teacher_hypotheses == validator.teacher_hypotheses
    np.testing.assert_array_equal(again.teacher.statistics["ter"], validator.teacher.statistics["ter"])


@pytest.mark.parametrize("change", ["teacher", "set", "beam size"])
def test_another_teacher_set_or_beam_size_is_decoded_anew(
    tmp_path, corpus, config, evaluator, validator, change
) -> None:
    sources, references, teacher_sha256 = corpus.sources, corpus.references, "teacher-hash"
    if change == "set":
        sources, references = sources[1:], references[1:]
    elif change == "teacher":
        teacher_sha256 = "another"
    else:
        config = replace(config, settings=config.settings.model_copy(update={"beam_size": 4}))
    again = DistillationValidator(config, tmp_path, sources, references, evaluator)
    with pytest.raises(AssertionError, match="decoded again"):
        again.score_teacher(must_not_decode, teacher_sha256)


def test_a_resumed_validator_judges_as_the_uninterrupted_one(tmp_path, corpus, config, evaluator, validator) -> None:
    for step, error_rate in ((1000, 0.4), (2000, 0.25), (3000, 0.3)):
        validator.validate(step, 1, corpus.translator(error_rate, step))
    state = json.loads(json.dumps(validator.state_dict()))
    resumed = DistillationValidator(config, tmp_path, corpus.sources, corpus.references, evaluator)
    resumed.score_teacher(must_not_decode, "teacher-hash")
    resumed.load_state_dict(state)
    timeless = {"decode_seconds": 0.0, "score_seconds": 0.0, "decode_tokens_per_second": None}
    expected = validator.validate(4000, 1, corpus.translator(0.6, 4))
    got = resumed.validate(4000, 1, corpus.translator(0.6, 4))
    assert replace(got, **timeless) == replace(expected, **timeless)
    assert got.verdict.verdict == "degraded"


def test_a_validation_for_the_record_is_forgotten(tmp_path, corpus, config, evaluator, validator) -> None:
    validator.validate(1000, 1, corpus.translator(0.4, 2))
    before = json.dumps(validator.state_dict())
    asked = validator.observe(1500, 1, corpus.translator(0.1, 3))
    assert asked.verdict.is_new_best
    assert asked.comparisons["best"]["step"] == 1000
    assert json.dumps(validator.state_dict()) == before
    assert (tmp_path / "asked" / "step_1500.json").exists()
    assert not (tmp_path / "step_1500.json").exists()
    result = validator.validate(2000, 1, corpus.translator(0.35, 4))
    assert result.comparisons["previous"]["step"] == 1000
    assert result.verdict.best_step == 1000


def test_a_missing_or_torn_statistics_file_is_told(tmp_path, corpus, config, evaluator, validator) -> None:
    validator.validate(1000, 1, corpus.translator(0.3))
    state = validator.state_dict()
    path = tmp_path / "step_1000.statistics.npz"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunFolderError, match=r"step_1000\.statistics\.npz"):
        validator.load_state_dict(state)
    (tmp_path / "step_1000.json").unlink()
    with pytest.raises(RunFolderError, match=r"step_1000\.json is missing"):
        validator.load_state_dict(state)


def test_a_failing_metric_is_no_decision_and_the_record_is_written(tmp_path, corpus, validator, monkeypatch) -> None:
    validator.validate(1000, 1, corpus.translator(0.3))

    def crash(*_args: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(validator.metrics["chrf"], "statistics", crash)
    result = validator.validate(2000, 1, corpus.translator(0.9))
    assert result.verdict.verdict == "no_decision"
    assert result.quality_score is None
    assert result.failures == {"chrf": "RuntimeError: boom"}
    assert json.loads((tmp_path / "step_2000.json").read_text())["failures"] == result.failures
    assert validator.detector.best_at == (1000, 1)
    monkeypatch.undo()
    assert validator.validate(3000, 1, corpus.translator(0.2)).verdict.verdict == "improved"


def test_without_a_teacher_quality_is_the_mean_of_the_values(tmp_path, corpus, config, evaluator) -> None:
    validator = DistillationValidator(config, tmp_path, corpus.sources, corpus.references, evaluator)
    result = validator.validate(500, 1, lambda sources: corpus.references)
    assert result.quality_score == pytest.approx(1.0)
    assert result.teacher_scores == {}
    assert result.verdict.verdict == "first"


def test_the_report_is_readable_and_obeys_no_control_characters(tmp_path, corpus, validator) -> None:
    hypotheses = corpus.translator(0.4)(corpus.sources)
    hypotheses[3] = "\x1b[31mred\u202e\nline"
    result = validator.validate(1000, 1, lambda sources: hypotheses, {"perplexity": 4.25})
    text = validator.write_best_report(result).read_text()
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\u001b[31mred" in text
    for expected in ("step 1000", "95 % interval", "bleu|nrefs:1|", "By length", "Worst sentences", "perplexity"):
        assert expected in text
    assert f"{result.scores['bleu']:.2f}" in text
    assert read_hypotheses(tmp_path / "step_1000.hypotheses.txt") == hypotheses


@pytest.mark.parametrize("text", ["", "plain", "two\nlines", "\\n", "\\\\n\r\n", "tab\tand \u2028 too", "end\\"])
def test_lines_are_escaped_reversibly(text: str) -> None:
    assert "\n" not in escape_line(text)
    assert unescape_line(escape_line(text)) == text


def test_bad_sets_and_translators_are_refused(tmp_path, corpus, config, evaluator) -> None:
    with pytest.raises(CorpusError, match="0 sources and 0 references"):
        DistillationValidator(config, tmp_path, [], [], evaluator)
    validator = DistillationValidator(config, tmp_path, corpus.sources, corpus.references, evaluator)
    with pytest.raises(ValueError, match="translated into 1 hypotheses"):
        validator.validate(1, 1, lambda sources: ["one"])
    assert ValidationFiles(tmp_path).read_json("step_1") is None


def test_the_config_is_taken_from_the_run() -> None:
    run = RunConfig.model_validate(
        {
            "seed": 7,
            "corpus": {"source_language": "fr", "target_language": "de", "train": [{"format": "tsv", "path": "x"}]},
            "validation": {"metrics": ["bleu", "chrf"]},
            "guard": {"degradation_threshold": 0.1},
        }
    )
    config = ValidationConfig.from_run(run, device="cuda:0")
    assert config == ValidationConfig(
        ValidationSettings(metrics=["bleu", "chrf"]), run.guard, "fr", "de", seed=7, device="cuda:0"
    )
