"""The judge of a loop: deploys the model as it would be delivered, validates its output, and reports the verdict.

Teachers and students share it. What is scored is the deployed model: for a student that is to ship in int8, the int8
model itself and its integer arithmetic, never the float weights it was trained from.

Where there is a scoring process, a judgement comes in two halves: `translate` at a step, `conclude` some steps later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.models.decoding import translate_texts
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.runs.events import EventWriter
from cvm_translator.training.guard import Judgement, Translated
from cvm_translator.training.state import LoopState
from cvm_translator.validation.result import ValidationResult
from cvm_translator.validation.scoring import Scored, ScoringFailed, ScoringProcess
from cvm_translator.validation.validator import DistillationValidator, Translate

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
        scoring: ScoringProcess | None = None,
        on_wait: Callable[[], object] = lambda: None,
    ) -> None:
        """`find_perplexity` is that of the validation set. `beat` is called before each batch that is decoded and
        `on_wait` while scores of `scoring` are waited for; what they raise ends the validation. Waiting gives no sign
        of life, so that a scoring process that hangs is found as a trainer is that hangs in scoring."""
        self.stage = stage
        self.events = events
        self.validator = validator
        self.tokenizer = tokenizer
        self.deploy = deploy
        self.find_perplexity = find_perplexity
        self.beat = beat
        self.scoring = scoring
        self.on_wait = on_wait

    @property
    def is_late(self) -> bool:
        return self.scoring is not None

    def judge(self, state: LoopState, model: CvmTransformer, bits: int) -> Judgement:
        translated = self.translate(model, bits)
        return self._conclude(
            state.step, state.attempt, translated, lambda: self.validator.score(translated["hypotheses"])
        )

    def translate(self, model: CvmTransformer, bits: int) -> Translated:
        """What the model says as deployed, as plain data: the half of a judgement that needs the model."""
        start = time.monotonic()
        translate, extra = self._deploy(model, bits)
        hypotheses, timing = self.validator.translate(translate)
        return {
            "hypotheses": hypotheses,
            "timing": timing,
            "extra": extra,
            "seconds": time.monotonic() - start,
        }

    def begin_scoring(self, translated: Translated) -> None:
        assert self.scoring is not None
        self.scoring.submit(translated["hypotheses"])

    def conclude(self, step: int, attempt: int, translated: Translated) -> Judgement:
        """The judgement of what was translated at a step, once its scores are there."""
        return self._conclude(step, attempt, translated, lambda: self._collect(step, attempt, translated))

    def _collect(self, step: int, attempt: int, translated: Translated) -> Scored:
        """The process's scores; computed here where a resumed run has no process, or it failed."""
        if self.scoring is None:
            return self.validator.score(translated["hypotheses"])
        if not self.scoring.is_busy:
            self.begin_scoring(translated)
        try:
            return self.scoring.collect(self.on_wait)
        except ScoringFailed as error:
            message = (
                f"the scoring process gave no scores of step {step} ({error}): they are computed between two steps"
            )
            self._warn(step, attempt, "scoring_process", message)
            return self.validator.score(translated["hypotheses"])

    def close(self) -> None:
        if self.scoring is not None:
            self.scoring.close()

    def _conclude(self, step: int, attempt: int, translated: Translated, score: Callable[[], Scored]) -> Judgement:
        start = time.monotonic()
        measurement, score_seconds = score()
        timing = translated["timing"] | {"score_seconds": score_seconds}
        result = self.validator.conclude(
            step, attempt, translated["hypotheses"], measurement, timing, translated["extra"]
        )
        self._tell(result, time.monotonic() - start + translated["seconds"], is_asked=False)
        verdict = result.verdict
        if verdict.is_new_best:
            self.validator.write_best_report(result)
        if verdict.verdict == "no_decision":
            self._warn(step, attempt, "no_decision", f"no decision on the validation at step {step}: {verdict.reason}")
        elif verdict.verdict == "warning":
            self._warn(step, attempt, "quality_drop", f"quality at step {step} {verdict.reason}")
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
        start = time.monotonic()
        result = self.validator.observe(state.step, state.attempt, *self._deploy(model, bits))
        self._tell(result, time.monotonic() - start, is_asked=True)

    def _deploy(self, model: CvmTransformer, bits: int) -> tuple[Translate, dict[str, Any]]:
        """What translates as the deployed model does, and what is measured of it beside the text."""
        deployed, settings = self.deploy(model, bits), self.validator.config.settings
        perplexity = self.find_perplexity(deployed)
        translate = partial(
            translate_texts,
            deployed,
            self.tokenizer,
            beam_size=settings.beam_size,
            batch_size=settings.batch_size,
            on_batch=self.beat,
        )
        return translate, {} if perplexity is None else {"perplexity": perplexity}

    def _tell(self, result: ValidationResult, seconds: float, *, is_asked: bool) -> None:
        """Tell the scores; `seconds` are those for which training stood still."""
        self.events.write(
            "validation",
            step=result.step,
            attempt=result.attempt,
            stage=self.stage,
            scores=result.scores | result.extra,
            teacher_scores=result.teacher_scores | self.validator.teacher_extra,
            quality_score=result.quality_score,
            retentions=result.retentions,
            probes=result.probes,
            decode_tokens_per_second=result.decode_tokens_per_second,
            asked=is_asked,
            seconds=seconds,
        )

    def start_width(self) -> None:
        self.validator.start_width()

    def is_best_held(self) -> bool:
        best = self.validator.detector.best
        return best is not None and self.validator.is_held(best)

    def _warn(self, step: int, attempt: int, code: str, message: str) -> None:
        self.events.write("warning", step=step, attempt=attempt, code=code, message=message)

    def state_dict(self) -> dict[str, Any]:
        return self.validator.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.validator.load_state_dict(state)
