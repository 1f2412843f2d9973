"""The loop: step, validate, verdict, keep or roll back. Teachers and students share it.

Guarantees
- `num_iterations` optimizer steps in the model's own history, however many were executed to get there.
- A checkpoint holds everything: a loop resumed from it goes on bit for bit as the uninterrupted one would have.
- A batch whose loss or gradient is not finite, or whose loss is a spike, moves nothing. After some in a row the loop
  goes back to its best checkpoint, as after a degraded validation.
- A verdict may come some steps after the validation that it is about (`late`): always after the same number of them, so
  that a resumed loop rolls back, narrows and halts where the uninterrupted one would have.
- Where the bit width falls during training, it falls only after a validation at which quality was held.
- A rollback is on disk before it is acted on, and its changed recipe is asserted after the old state is loaded.
- A stop, and whatever observers ask for, is obeyed at a step's end; before a stop and a pause there is a checkpoint.
  A validation is left for a stop, and made when the loop is resumed.
- A disk that is full during a save pauses the loop; it goes on when there is room.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

from cvm_translator.checkpoints.folder import LoadedCheckpoint
from cvm_translator.checkpoints.store import checkpoint_name
from cvm_translator.corpus.prefetch import BatchFeed
from cvm_translator.errors import Stopped
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.training import late
from cvm_translator.training.faults import active_faults, learning_rate_factor
from cvm_translator.training.guard import DecisionFile, Judgement, choose_action, max_executed_steps, next_recipe
from cvm_translator.training.optimizer import MovingAverage, build_optimizer
from cvm_translator.training.progress import ProgressMeter
from cvm_translator.training.requests import obey_requests
from cvm_translator.training.resume import START, capture, load_best, restore
from cvm_translator.training.room import judge_with_room, with_room
from cvm_translator.training.schedules import compute_learning_rate
from cvm_translator.training.setup import LoopOutcome, LoopSetup
from cvm_translator.training.spikes import SpikeWindow
from cvm_translator.training.state import LoopState
from cvm_translator.training.step import StepResult, train_step
from cvm_translator.training.widths import UNROUNDED_BITS

Result = TypeVar("Result")


class TrainingLoop:
    """One training run of one model."""

    def __init__(self, setup: LoopSetup) -> None:
        self.setup = setup
        self.state = LoopState()
        self.optimizer = build_optimizer(setup.model, setup.settings)
        self.average = MovingAverage(setup.model, setup.settings.ema_decay) if setup.settings.ema_decay else None
        # Without the guard no loss is too high: a run that has gone bad would skip every batch from then on.
        threshold = setup.guard.spike_threshold if setup.guard.enabled else math.inf
        self.spikes = SpikeWindow(setup.guard.spike_window_steps, threshold)
        self.decision = DecisionFile(setup.store.directory / "rollback.json", report=self._report_damage)
        peak = setup.cost.peak if setup.cost is not None else None
        self.progress = ProgressMeter(setup.events, setup.stage, setup.settings.num_iterations, peak)
        self.is_paused = False
        if setup.is_compiled:
            setup.objective.compile()
        self._saved_executed_steps: int | None = None
        self._feed: BatchFeed  # while `run` runs

    def run(self) -> LoopOutcome:
        """Train to the end, resuming from the newest valid checkpoint if there is one. Raises Stopped."""
        setup = self.setup
        with BatchFeed(setup.dataset, setup.batches, setup.device, setup.read_stored) as self._feed:
            try:
                return self._run()
            finally:
                if setup.late is not None:
                    setup.late.close()

    def _run(self) -> LoopOutcome:
        setup = self.setup
        setup.store.protect(START)
        if not self._resume():
            self.save()
        late.take_up_scoring(self)
        if self.state.is_unjudged:
            self._validate()
        self._halt_at_budget()
        while self.state.step < setup.settings.num_iterations and self.state.halted is None:
            # ------------------------------------------------------------------------------------------- training step
            setup.heartbeat.beat("step", stage=setup.stage, step=self.state.step, attempt=self.state.attempt)
            result = self._step()
            # ---------------------------------------------------------------- once in a while: validate and judge, save
            if result.rejected is not None:
                self._after_rejection(result)
            elif late.is_verdict_due(self.state) and not late.conclude(self):
                pass  # rolled back or halted, and saved
            elif self.state.step % setup.validate_every_steps == 0 or self.state.step == setup.settings.num_iterations:
                self._validate()
            elif self.state.step % setup.settings.checkpoint_every_steps == 0:
                self.save()
            # ------------------------------------------------------------------------------------- is there more to do?
            self._halt_at_budget()
            obey_requests(self)
            if setup.stop.signal_number is not None:
                self.save_unless_saved()
            setup.stop.raise_if_requested()
        self.progress.report(self.state)
        return self._finish()

    def _halt_at_budget(self) -> None:
        state, num_iterations = self.state, self.setup.settings.num_iterations
        is_used_up = state.executed_steps >= max_executed_steps(self.setup.guard, num_iterations)
        if state.halted is not None or state.step == num_iterations or not is_used_up:
            return
        late.conclude(self)
        if self.state.halted is None:
            self._halt(f"the step budget is used up ({state.executed_steps} steps executed)")

    def _halt(self, reason: str) -> None:
        """End the loop before its time; the checkpoint says so, so a rerun does not go on."""
        self.state.halted = reason
        self.save()

    def _finish(self) -> LoopOutcome:
        """Name what is delivered: the best checkpoint, or the last one where the guard is off or has judged nothing."""
        state = self.state
        bits = self.setup.widths.widths[state.width_index]
        if self.setup.guard.enabled and state.best_checkpoint is not None:
            if state.held is not None and not self.setup.judge.is_best_held():
                bits, state.best_checkpoint = state.held["bits"], state.held["checkpoint"]
            best = load_best(self.setup, state.best_checkpoint)
            state.best_checkpoint, state.best_step = best.path.name, best.step
            return LoopOutcome(state, state.best_checkpoint, state.halted, bits)
        return LoopOutcome(state, checkpoint_name(state.step, state.attempt), state.halted, bits)

    # ------------------------------------------------------------------------------------------------------- the step

    def _step(self) -> StepResult:
        setup, state = self.setup, self.state
        step, executed_step = state.step + 1, state.executed_steps + 1
        faults = active_faults(setup.faults or [], executed_step)
        learning_rate = compute_learning_rate(setup.settings, step) * state.learning_rate_factor
        learning_rate *= learning_rate_factor(faults)
        setup.model.train()
        setup.prepare(setup.model, setup.widths.training_bits(step, state.width_index))
        batch = self._feed.next()
        result = train_step(
            setup.model,
            setup.objective,
            self.optimizer,
            batch,
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
        self.progress.count(result, state, setup.cost.count(batch) if setup.cost is not None else 0.0)
        return result

    # -------------------------------------------------------------------------------------------- verdicts and rollback

    def _validate(self) -> None:
        """Validate, and act on the verdict: now, or some steps later where scores are computed beside training."""
        setup, state = self.setup, self.state
        setup.heartbeat.beat("validation", stage=setup.stage, step=state.step, attempt=state.attempt)
        self.progress.report(state)
        if late.conclude(self):
            bits = setup.widths.widths[state.width_index]
            if late.is_late(setup, state):
                late.translate(self, bits)
            else:
                judgement = self.unless_stopped(lambda: setup.judge.judge(state, self.validated_model(), bits))
                self.act_on(judgement, state.step, bits)
        self.progress.restart()

    def act_on(self, judgement: Judgement, step: int, bits: int) -> None:
        """Keep, roll back or halt; `step`, of this attempt, is that of the validation."""
        setup, state = self.setup, self.state
        is_best = judgement.is_best
        if judgement.is_decided:
            state.validations_since_best = 0 if is_best else state.validations_since_best + 1
        action = choose_action(judgement, state, setup.guard)
        setup.events.write(
            "verdict",
            step=step,
            attempt=state.attempt,
            stage=setup.stage,
            action=action,
            best_step=step if is_best else state.best_step,
            verdict=judgement.verdict,
            reason=judgement.reason,
            bits=bits,
            **judgement.figures,
        )
        if is_best:
            state.best_step = step
            state.best_checkpoint = checkpoint_name(step, state.attempt)
            setup.store.unprotect(START)
        if action == "keep":
            is_over = state.step == setup.settings.num_iterations
            if judgement.is_held and not is_over and setup.widths.may_narrow(state.step, state.width_index):
                self._narrow()
                self.save()
            elif step == state.step:
                self.save()
            elif is_best:
                late.make_best(self, checkpoint_name(step, state.attempt))
        elif action == "roll_back":
            self._roll_back(judgement.reason)
        elif judgement.is_degraded:
            self._halt(f"{judgement.reason}; {len(state.rollbacks)} rollbacks did not help")
        else:
            self._halt(f"no new best in {state.validations_since_best} validations")

    def unless_stopped(self, work: Callable[[], Result]) -> Result:
        """What a validation's work gives; one that a stop cuts short is made when the loop is resumed."""
        setup, state = self.setup, self.state
        try:
            setup.stop.raise_if_requested()
            result = judge_with_room(setup, state, work)
        except Stopped as stopped:
            state.is_unjudged = True
            self.save_unless_saved()
            raise Stopped(stopped.signal_number) from None
        state.is_unjudged = False
        return result

    def _narrow(self) -> None:
        """Go on with fewer bits: the checkpoint of this step is the new width's rollback target until it has a best."""
        setup, state = self.setup, self.state
        assert state.best_checkpoint is not None
        here = checkpoint_name(state.step, state.attempt)
        if state.held is not None:
            setup.store.unprotect(state.held["checkpoint"])
        state.held = {"checkpoint": state.best_checkpoint, "bits": setup.widths.widths[state.width_index]}
        setup.store.protect(state.held["checkpoint"])
        state.width_index += 1
        state.best_step, state.best_checkpoint = state.step, here
        setup.judge.start_width()

    def _after_rejection(self, result: StepResult) -> None:
        """Tell of a skipped batch; after some in a row go back to the best checkpoint, or halt."""
        setup, state = self.setup, self.state
        setup.events.write(
            "warning",
            step=state.step + 1,
            attempt=state.attempt,
            code="batch_skipped",
            message=f"{result.rejected} (loss {result.loss:.4g}, gradient norm {result.grad_norm:.4g}): batch skipped",
        )
        if not setup.guard.enabled or state.consecutive_skips < setup.guard.max_consecutive_skips:
            return
        if not late.conclude(self):
            return  # back already, or at an end
        reason = f"emergency: {result.rejected} in {state.consecutive_skips} batches in a row"
        if len(state.rollbacks) < setup.guard.max_rollbacks:
            self._roll_back(reason)
        else:
            self._halt(f"{reason}; {len(state.rollbacks)} rollbacks did not help")

    def _roll_back(self, reason: str) -> None:
        """Go back to the best checkpoint (or the start) with the next recipe: decide on disk, then act."""
        state = self.state
        recipe = next_recipe(state, self.setup.guard)
        target = load_best(self.setup, state.best_checkpoint or START)
        state.rollbacks.append(
            {
                "step": state.step,
                "to_step": target.step,
                "reason": reason,
                "learning_rate_factor": recipe.learning_rate_factor,
                "data_stream": recipe.data_stream,
            }
        )
        with_room(self.setup, state, lambda: self.decision.write(recipe, target.path.name, state))
        decision = self.decision.pending(state.attempt)
        assert decision is not None
        self._carry_out(decision, target)

    def _carry_out(self, decision: dict[str, Any], target: LoadedCheckpoint) -> None:
        """Restore the rollback's checkpoint and override its recipe; what was executed stays executed."""
        setup, latest = self.setup, decision["rollbacks"][-1]
        setup.events.write(
            "rollback",
            step=latest["step"],
            attempt=decision["attempt"] - 1,
            stage=setup.stage,
            reason=latest["reason"],
            from_step=latest["step"],
            to_step=target.step,
            rollback_number=len(decision["rollbacks"]),
            learning_rate_factor=decision["learning_rate_factor"],
            data_stream=decision["data_stream"],
        )
        self._restore(target)
        state = self.state
        state.attempt = decision["attempt"]
        state.learning_rate_factor = decision["learning_rate_factor"]
        state.data_stream = decision["data_stream"]
        state.executed_steps = decision["executed_steps"]
        state.num_skipped = decision["num_skipped"]
        state.rollbacks = decision["rollbacks"]
        state.consecutive_skips = 0
        setup.batches.change_stream(state.data_stream)
        self._require_recipe(decision)
        self.save()

    def _require_recipe(self, decision: dict[str, Any]) -> None:
        """Raise where the old state, which was loaded, has undone what the rollback changes."""
        found = {"learning_rate_factor": self.state.learning_rate_factor, "data_stream": self.setup.batches.stream}
        for name, value in found.items():
            if value != decision[name]:
                raise RuntimeError(f"{name} is {value} after a rollback that changes it to {decision[name]}")

    # ------------------------------------------------------------------------------------------------------ checkpoints

    def validated_model(self) -> CvmTransformer:
        """The model as it would be delivered now: the averaged weights where averaging is on, ready to run."""
        model = self.setup.model
        if self.average is not None:
            averaged = type(model)(model.config, model.vocab_size).to(self.setup.device)
            averaged.load_state_dict(model.state_dict() | self.average.tensors)
            model = averaged
        self.setup.prepare(model, UNROUNDED_BITS)
        return model.eval()

    def _report_damage(self, message: str) -> None:
        self.setup.tell(self.state, "warning", code="checkpoint", message=message)

    def save_unless_saved(self) -> None:
        """Have a checkpoint of this very step."""
        if self._saved_executed_steps != self.state.executed_steps:
            self.save()

    def save(self) -> None:
        """Save the state of this step."""
        setup, state = self.setup, self.state
        setup.heartbeat.beat("save")
        # Events first: a step that a checkpoint covers is not replayed, so its loss must not die with the process.
        with_room(setup, state, lambda: setup.events.flush(sync=True))
        is_best = state.best_checkpoint == checkpoint_name(state.step, state.attempt)
        captured = capture(setup, state, self.optimizer, self.average, self.spikes)
        saved = with_room(
            setup, state, lambda: setup.store.save(state.step, state.attempt, **captured, is_best=is_best)
        )
        self._saved_executed_steps = state.executed_steps
        setup.tell(
            state,
            "checkpoint",
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
        setup.tell(self.state, "resumed", exact=not differences, differences=differences)
        decision = self.decision.pending(self.state.attempt)
        if decision is not None:
            self._carry_out(decision, load_best(setup, decision["checkpoint"]))
        return True

    def _restore(self, checkpoint: LoadedCheckpoint) -> list[str]:
        """Put every piece back; returns what differs from the machine that saved it."""
        self.state, differences = restore(checkpoint, self.setup, self.optimizer, self.average, self.spikes)
        if self.state.best_checkpoint is not None:
            self.setup.store.unprotect(START)
        else:
            self.setup.store.protect(START)
        if self.state.held is not None:
            self.setup.store.protect(self.state.held["checkpoint"])
        if self.state.pending is not None:
            self.setup.store.protect(late.pending_checkpoint(self.state.pending))
        self._saved_executed_steps = self.state.executed_steps
        return differences
