"""The loop: step, validate, verdict, keep or roll back. Teachers and students share it.

Guarantees
- `num_iterations` optimizer steps in the model's own history, however many were executed to get there.
- A checkpoint holds everything: a loop resumed from it goes on bit for bit as the uninterrupted one would have.
- A batch whose loss or gradient is not finite, or whose loss is a spike, moves nothing. After some in a row the loop
  goes back to its best checkpoint, as after a degraded validation.
- A rollback is on disk before it is acted on, and its changed recipe is asserted after the old state is loaded.
- A stop request is obeyed at a step's end, after a checkpoint.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from cvm_translator.checkpoints.folder import LoadedCheckpoint
from cvm_translator.checkpoints.store import CheckpointStore, checkpoint_name
from cvm_translator.config.schema import FaultInjection, GuardConfig, TrainingConfig
from cvm_translator.corpus.batches import BatchSchedule
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.runs.events import EventWriter
from cvm_translator.training.device import describe_numerics
from cvm_translator.training.faults import active_faults, learning_rate_factor
from cvm_translator.training.guard import DecisionFile, Judge, choose_action, max_executed_steps, next_recipe
from cvm_translator.training.objectives import Objective
from cvm_translator.training.optimizer import MovingAverage, build_optimizer
from cvm_translator.training.schedules import compute_learning_rate
from cvm_translator.training.signals import StopRequest
from cvm_translator.training.spikes import SpikeWindow
from cvm_translator.training.state import LoopState, capture_random_state, restore_random_state
from cvm_translator.training.step import StepResult, train_step

PROGRESS_EVERY_SECONDS = 5.0
START = checkpoint_name(0, 1)
"""The rollback target until there is a best checkpoint."""


@dataclass(frozen=True)
class LoopOutcome:
    """How a loop ended."""

    state: LoopState
    final_checkpoint: str
    """Name of the checkpoint to deliver: the best one, or the last where the guard is off."""
    halted: str | None
    """Why the loop ended before `num_iterations`, if it did."""


@dataclass
class LoopSetup:
    """The finished parts of one loop."""

    stage: str
    """teacher or distil: the name in the events."""
    settings: TrainingConfig
    guard: GuardConfig
    model: CvmTransformer
    objective: Objective
    dataset: DistillationDataset
    batches: BatchSchedule
    store: CheckpointStore
    events: EventWriter
    judge: Judge
    stop: StopRequest
    device: torch.device
    validate_every_steps: int
    quantize_from_step: int | None = None
    """First step that is fake-quantised; None: never."""
    faults: list[FaultInjection] | None = None


class TrainingLoop:
    """One training run of one model."""

    def __init__(self, setup: LoopSetup) -> None:
        self.setup = setup
        self.state = LoopState()
        self.optimizer = build_optimizer(setup.model, setup.settings)
        self.average = MovingAverage(setup.model, setup.settings.ema_decay) if setup.settings.ema_decay else None
        self.spikes = SpikeWindow(setup.guard.spike_window_steps, setup.guard.spike_threshold)
        self.decision = DecisionFile(setup.store.directory / "rollback.json")
        self._progress_time = time.monotonic()
        self._progress_steps = 0
        self._progress_tokens = 0

    def run(self) -> LoopOutcome:
        """Train to the end, resuming from the newest valid checkpoint if there is one. Raises Stopped."""
        setup, state = self.setup, self.state
        halted = None
        setup.store.protect(START)
        if not self._resume():
            self._save(is_best=False)
        state = self.state
        while state.step < setup.settings.num_iterations and halted is None:
            # ------------------------------------------------------------------------------------------- training step
            result = self._step()
            if result.rejected is not None:
                halted = self._after_rejection(result)
                state = self.state
                if setup.stop.signal_number is not None:
                    self._save(is_best=False)
                    setup.stop.raise_if_requested()
                continue
            # ------------------------------------------------------------------------- once in a while: validate, judge
            if state.step % setup.validate_every_steps == 0 or state.step == setup.settings.num_iterations:
                halted = self._validate()
                state = self.state
            elif state.step % setup.settings.checkpoint_every_steps == 0 or setup.stop.signal_number is not None:
                self._save(is_best=False)
            setup.stop.raise_if_requested()
            if halted is None and self._is_budget_used_up():
                halted = f"the step budget is used up ({state.executed_steps} steps executed)"
        self._report_progress()
        return LoopOutcome(state, self._final_checkpoint(), halted)

    def _is_budget_used_up(self) -> bool:
        num_iterations = self.setup.settings.num_iterations
        is_unfinished = self.state.step < num_iterations
        return is_unfinished and self.state.executed_steps >= max_executed_steps(self.setup.guard, num_iterations)

    # ------------------------------------------------------------------------------------------------------- the step

    def _step(self) -> StepResult:
        setup, state = self.setup, self.state
        step, executed_step = state.step + 1, state.executed_steps + 1
        faults = active_faults(setup.faults or [], executed_step)
        learning_rate = compute_learning_rate(setup.settings, step) * state.learning_rate_factor
        learning_rate *= learning_rate_factor(faults)
        setup.model.train()
        setup.model.set_fake_quantization(setup.quantize_from_step is not None and step >= setup.quantize_from_step)
        result = train_step(
            setup.model,
            setup.objective,
            self.optimizer,
            setup.dataset.batch(setup.batches.next()).to(setup.device),
            setup.settings,
            self.spikes,
            learning_rate=learning_rate,
            average=self.average,
            faults=faults,
        )
        state.executed_steps += 1
        if result.rejected is None:
            state.step += 1
            state.consecutive_skips = 0
        else:
            state.num_skipped += 1
            state.consecutive_skips += 1
        setup.events.buffer(
            "train",
            step=step,
            attempt=state.attempt,
            stage=setup.stage,
            executed_step=executed_step,
            loss=result.loss,
            distillation_loss=result.distillation_loss,
            task_loss=result.task_loss,
            accuracy=result.accuracy,
            learning_rate=learning_rate,
            grad_norm=result.grad_norm,
            num_tokens=result.num_tokens,
            skipped=result.rejected is not None,
        )
        self._progress_steps += 1
        self._progress_tokens += result.num_tokens
        if time.monotonic() - self._progress_time >= PROGRESS_EVERY_SECONDS:
            self._report_progress()
        return result

    def _report_progress(self) -> None:
        seconds = time.monotonic() - self._progress_time
        setup, state = self.setup, self.state
        if self._progress_steps and seconds > 0:
            speed = self._progress_steps / seconds
            setup.events.write(
                "progress",
                step=state.step,
                attempt=state.attempt,
                stage=setup.stage,
                num_iterations=setup.settings.num_iterations,
                steps_per_second=speed,
                tokens_per_second=self._progress_tokens / seconds,
                eta_seconds=(setup.settings.num_iterations - state.step) / speed,
                memory_mib=psutil.Process().memory_info().rss / 2**20,
            )
        self._progress_time, self._progress_steps, self._progress_tokens = time.monotonic(), 0, 0

    # -------------------------------------------------------------------------------------------- verdicts and rollback

    def _validate(self) -> str | None:
        """Validate, judge, keep or roll back. Returns why the loop must halt, if it must."""
        setup, state = self.setup, self.state
        self._report_progress()
        judgement = setup.judge.judge(state, self.validated_model())
        is_best = judgement.is_best
        state.validations_since_best = 0 if is_best else state.validations_since_best + 1
        action = choose_action(judgement, state, setup.guard)
        setup.events.write(
            "verdict",
            step=state.step,
            attempt=state.attempt,
            stage=setup.stage,
            action=action,
            best_step=state.step if is_best else state.best_step,
            verdict=judgement.verdict,
            reason=judgement.reason,
            **judgement.figures,
        )
        if is_best:
            state.best_step = state.step
            state.best_checkpoint = checkpoint_name(state.step, state.attempt)
            setup.store.unprotect(START)
        reason = None
        if action == "keep":
            self._save(is_best=is_best)
        elif action == "roll_back":
            self._roll_back(judgement.reason)
        elif judgement.is_degraded:
            reason = f"{judgement.reason}; {len(state.rollbacks)} rollbacks did not help"
        else:
            self._save(is_best=is_best)
            reason = f"no new best in {state.validations_since_best} validations"
        self._progress_time = time.monotonic()
        return reason

    def _after_rejection(self, result: StepResult) -> str | None:
        setup, state = self.setup, self.state
        setup.events.write(
            "warning",
            step=state.step + 1,
            attempt=state.attempt,
            code="batch_skipped",
            message=f"{result.rejected} (loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}): batch skipped",
        )
        if state.consecutive_skips < setup.guard.max_consecutive_skips:
            return None
        reason = f"emergency: {result.rejected} in {state.consecutive_skips} batches in a row"
        if len(state.rollbacks) >= setup.guard.max_rollbacks:
            return f"{reason}; {len(state.rollbacks)} rollbacks did not help"
        self._roll_back(reason)
        return None

    def _roll_back(self, reason: str) -> None:
        """Go back to the best checkpoint (or the start) with the next recipe: decide on disk, then act."""
        setup, state = self.setup, self.state
        recipe = next_recipe(state, setup.guard)
        target = state.best_checkpoint or START
        to_step = state.best_step or 0
        state.rollbacks.append(
            {
                "step": state.step,
                "to_step": to_step,
                "reason": reason,
                "learning_rate_factor": recipe.learning_rate_factor,
                "data_stream": recipe.data_stream,
            }
        )
        self.decision.write(recipe, target, state)
        setup.events.write(
            "rollback",
            step=state.step,
            attempt=state.attempt,
            stage=setup.stage,
            reason=reason,
            from_step=state.step,
            to_step=to_step,
            rollback_number=len(state.rollbacks),
            learning_rate_factor=recipe.learning_rate_factor,
            data_stream=recipe.data_stream,
        )
        decision = self.decision.pending(state.attempt)
        assert decision is not None
        self._carry_out(decision)

    def _carry_out(self, decision: dict[str, Any]) -> None:
        """Load the rollback's checkpoint and override its recipe; what was executed stays executed."""
        self._restore(self.setup.store.load(decision["checkpoint"]))
        state = self.state
        state.attempt = decision["attempt"]
        state.learning_rate_factor = decision["learning_rate_factor"]
        state.data_stream = decision["data_stream"]
        state.executed_steps = decision["executed_steps"]
        state.num_skipped = decision["num_skipped"]
        state.rollbacks = decision["rollbacks"]
        state.consecutive_skips = 0
        self.setup.batches.change_stream(state.data_stream)
        assert self.setup.batches.state_dict()["stream"] == state.data_stream
        self._save(is_best=False)

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def validated_model(self) -> CvmTransformer:
        """The model as it would be delivered now: the averaged weights where averaging is on, ready to run."""
        model = self.setup.model
        if self.average is not None:
            averaged = type(model)(model.config, model.vocab_size).to(self.setup.device)
            averaged.load_state_dict(model.state_dict() | self.average.tensors)
            model = averaged
        model.set_fake_quantization(False)
        return model.eval()

    def _save(self, *, is_best: bool) -> None:
        setup, state = self.setup, self.state
        plain = {
            "loop": state.to_plain(),
            "batches": setup.batches.state_dict(),
            "judge": setup.judge.state_dict(),
            "spikes": self.spikes.state_dict(),
            "num_averaged": self.average.num_updates if self.average else None,
            "numerics": describe_numerics(setup.device),
        }
        tensors = {"model": setup.model.state_dict()}
        if self.average is not None:
            tensors["ema"] = self.average.tensors
        saved = setup.store.save(
            state.step,
            state.attempt,
            tensors=tensors,
            torch_states={"optimizer": self.optimizer.state_dict(), "random": capture_random_state()},
            plain=plain,
            is_best=is_best,
        )
        setup.events.write(
            "checkpoint",
            step=state.step,
            attempt=state.attempt,
            stage=setup.stage,
            path=saved.path.name,
            is_best=is_best,
            num_bytes=saved.num_bytes,
            seconds=saved.seconds,
        )

    def _resume(self) -> bool:
        """Go on from the newest valid checkpoint, and carry out a rollback that was decided but not done."""
        setup = self.setup
        checkpoint = setup.store.load_newest_valid()
        if checkpoint is None:
            return False
        differences = self._restore(checkpoint)
        setup.events.write(
            "resumed",
            step=self.state.step,
            attempt=self.state.attempt,
            stage=setup.stage,
            exact=not differences,
            differences=differences,
        )
        decision = self.decision.pending(self.state.attempt)
        if decision is not None:
            self._carry_out(decision)
        return True

    def _restore(self, checkpoint: LoadedCheckpoint) -> list[str]:
        """Put every piece back; returns what differs from the machine that saved it."""
        setup, plain = self.setup, checkpoint.plain
        setup.model.load_state_dict(checkpoint.tensors["model"])
        self.optimizer.load_state_dict(checkpoint.torch_states["optimizer"])
        if self.average is not None:
            self.average.load_tensors(checkpoint.tensors["ema"], plain["num_averaged"])
        self.state = LoopState.from_plain(plain["loop"])
        setup.batches.load_state_dict(plain["batches"])
        setup.judge.load_state_dict(plain["judge"])
        self.spikes.load_state_dict(plain["spikes"])
        restore_random_state(checkpoint.torch_states["random"])
        now = describe_numerics(setup.device)
        return [f"{key}: was {old}, is {now.get(key)}" for key, old in plain["numerics"].items() if old != now.get(key)]

    def delivered_weights(self, outcome: LoopOutcome) -> dict[str, torch.Tensor]:
        """The state_dict of the model to deliver, read back and verified from its checkpoint."""
        tensors = self.setup.store.load(outcome.final_checkpoint).tensors
        return tensors["model"] | tensors.get("ema", {})

    def _final_checkpoint(self) -> str:
        state = self.state
        if self.setup.guard.enabled and state.best_checkpoint is not None:
            return state.best_checkpoint
        return checkpoint_name(state.step, state.attempt)
