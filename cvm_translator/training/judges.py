"""The judge of a loop: deploys the model as it would be delivered, validates its output, and reports the verdict.

Teachers and students share it. What is scored is the deployed model: for a student that is to ship in int8, the int8
model itself and its integer arithmetic, never the float weights it was trained from.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.models.decoding import translate_texts
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.runs.events import EventWriter
from cvm_translator.training.guard import Judgement
from cvm_translator.training.state import LoopState
from cvm_translator.validation.result import ValidationResult
from cvm_translator.validation.validator import DistillationValidator

Deploy = Callable[[CvmTransformer, int], CvmTransformer]
"""From the float model and the bit width of the moment to a copy in the deployed number format."""

SOUND = ("first", "improved", "healthy")
"""Verdicts after which fewer bits may be tried; a warning is not among them."""


class ValidationJudge:
    """Validates on one frozen set and judges against the best so far; its memory is part of each checkpoint."""

    def __init__(
        self,
        stage: str,
        events: EventWriter,
        validator: DistillationValidator,
        tokenizer: Tokenizer,
        deploy: Deploy,
        find_perplexity: Callable[[CvmTransformer], float | None],
        beat: Callable[[], object] | None = None,
    ) -> None:
        """`find_perplexity` is that of the validation set; `beat` is called before each batch that is decoded, and what
        it raises ends the validation."""
        self.stage = stage
        self.events = events
        self.validator = validator
        self.tokenizer = tokenizer
        self.deploy = deploy
        self.find_perplexity = find_perplexity
        self.beat = beat

    def judge(self, state: LoopState, model: CvmTransformer, bits: int) -> Judgement:
        result = self._validate(state, model, bits, self.validator.validate, is_asked=False)
        verdict = result.verdict
        if verdict.is_new_best:
            self.validator.write_best_report(result)
        if verdict.verdict == "no_decision":
            self._warn(state, "no_decision", f"no decision on the validation at step {state.step}: {verdict.reason}")
        elif verdict.verdict == "warning":
            self._warn(state, "quality_drop", f"quality at step {state.step} {verdict.reason}")
        figures = verdict.to_json()
        for name in ("verdict", "reason", "best_step"):
            del figures[name]
        assert result.measurement is not None
        is_held = verdict.verdict in SOUND and self.validator.is_held(result.measurement)
        return Judgement(
            verdict.verdict, verdict.is_new_best, verdict.asks_for_rollback, verdict.reason, figures, is_held
        )

    def observe(self, state: LoopState, model: CvmTransformer, bits: int) -> None:
        """Validate for the record: nothing of it is remembered."""
        self._validate(state, model, bits, self.validator.observe, is_asked=True)

    def _validate(
        self, state: LoopState, model: CvmTransformer, bits: int, validate: Any, *, is_asked: bool
    ) -> ValidationResult:
        """Deploy, let `validate` measure, and tell the scores."""
        start = time.monotonic()
        deployed = self.deploy(model, bits)
        settings = self.validator.config.settings

        def translate(sources: list[str]) -> list[str]:
            return translate_texts(
                deployed,
                self.tokenizer,
                sources,
                beam_size=settings.beam_size,
                batch_size=settings.batch_size,
                on_batch=self.beat,
            )

        perplexity = self.find_perplexity(deployed)
        extra = {} if perplexity is None else {"perplexity": perplexity}
        result: ValidationResult = validate(state.step, state.attempt, translate, extra)
        self.events.write(
            "validation",
            step=state.step,
            attempt=state.attempt,
            stage=self.stage,
            scores=result.scores | extra,
            teacher_scores=result.teacher_scores | self.validator.teacher_extra,
            quality_score=result.quality_score,
            retentions=result.retentions,
            probes=result.probes,
            decode_tokens_per_second=result.decode_tokens_per_second,
            asked=is_asked,
            seconds=time.monotonic() - start,
        )
        return result

    def start_width(self) -> None:
        self.validator.start_width()

    def is_best_held(self) -> bool:
        best = self.validator.detector.best
        return best is not None and self.validator.is_held(best)

    def _warn(self, state: LoopState, code: str, message: str) -> None:
        self.events.write("warning", step=state.step, attempt=state.attempt, code=code, message=message)

    def state_dict(self) -> dict[str, Any]:
        return self.validator.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.validator.load_state_dict(state)
