"""What is told at a run's end, whatever there is to tell."""

from __future__ import annotations

from typing import Any

import pytest

from cvm_translator.config import DistillationConfig
from cvm_translator.pipeline.cards import build_model_card, describe_outcome, describe_verdict


@pytest.fixture
def final() -> dict[str, Any]:
    def scores(bleu: float) -> dict[str, Any]:
        return {"scores": {"bleu": {"value": bleu, "low": bleu, "high": bleu}}}

    kept = {"quality_score": {"value": 0.5}, "bleu": {"value": 0.25}}
    return {
        "deployed": "int8",
        "models": {
            "teacher": {"num_bytes": 30 << 20, "tokens_per_second": 100.0},
            "int8": {"num_bytes": 3 << 20, "tokens_per_second": 250.0},
        },
        "test": {"teacher": scores(40.0), "int8": scores(10.0) | {"retentions": kept}},
        "gate": {"passed": False, "failures": ["BLEU keeps 25.0% of the teacher's"]},
        "halted": True,
        "halt_reason": "3 rollbacks did not help",
    }


def test_the_outcome(final: dict[str, Any]) -> None:
    assert describe_outcome(final) == (
        "test set: teacher BLEU 40.0, int8 student 10.0 (25.0%); quality 50.0%; 30.0 MiB to 3.0 MiB (10.0 times"
        " smaller), 2.5 times the teacher's tokens per second"
    )


def test_a_teacher_that_scores_nothing_has_no_share_kept(final: dict[str, Any]) -> None:
    del final["test"]["int8"]["retentions"]["bleu"]
    assert "int8 student 10.0; quality 50.0%" in describe_outcome(final)


def test_the_verdict_comes_first(final: dict[str, Any]) -> None:
    begin = "GATE FAILED: BLEU keeps 25.0% of the teacher's (halted: 3 rollbacks did not help); test set: "
    assert describe_verdict(final).startswith(begin)
    assert describe_verdict(final | {"gate": {"passed": True}, "halted": False}).startswith("gate passed; test set: ")


@pytest.mark.parametrize(
    ("method", "words"),
    [("none", "; no quantisation."), ("qat", "; quantisation-aware training to 8 bits.")],
)
def test_the_card_tells_how_it_was_quantised(method: str, words: str, final: dict[str, Any]) -> None:
    for model in final["models"].values():
        model |= {"num_parameters": 1_000_000, "number_format": "float32"}
    final["test"]["int8"]["retentions"]["quality_score"] |= {"low": 0.4, "high": 0.6}
    final |= {"num_iterations": 100, "executed_steps": 100, "rollbacks": [], "best_step": 100}
    final["corpus"] = {"train": 1000, "sha256": "0123456789abcdef0123"}
    card = build_model_card(DistillationConfig(quantization={"method": method}), final)
    assert words in card
    assert "**FAILED**" in card
