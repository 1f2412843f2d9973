"""Real checkpoints for the proofs of the store: the product's own loop on a model so small that a save takes moments.

The model, the data and the number of steps are tiny; the loop, what it captures and how it is saved are the product's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvm_translator.checkpoints.folder import LoadedCheckpoint
from cvm_translator.checkpoints.store import CheckpointStore
from cvm_translator.config.schema import GuardConfig, ModelConfig, TrainingConfig
from cvm_translator.corpus.batches import BatchSchedule
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.losses.distillation import DistillationLoss
from cvm_translator.models.initialization import init_random
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.runs.events import EventWriter
from cvm_translator.training.guard import Judgement
from cvm_translator.training.loop import TrainingLoop
from cvm_translator.training.objectives import DistillationObjective
from cvm_translator.training.setup import LoopSetup
from cvm_translator.training.signals import StopRequest
from cvm_translator.training.state import LoopState, seed_everything

VOCAB = 24
MODEL = {"num_heads": 2, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0.1, "max_length": 16}
SAVE_EVERY_STEPS = 2


class Content:
    """A judge that finds every validation better than the one before: each is a new best."""

    def __init__(self) -> None:
        self.judged: list[int] = []

    def judge(self, state: LoopState, model: CvmTransformer, bits: int) -> Judgement:
        self.judged.append(state.step)
        return Judgement("improved", True, False, "better", {})

    def observe(self, state: LoopState, model: CvmTransformer, bits: int) -> None:
        raise AssertionError("nobody asks for a validation")

    def start_width(self) -> None:
        raise AssertionError("there is one width only")

    def is_best_held(self) -> bool:
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"judged": list(self.judged)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.judged = list(state["judged"])


def build_setup(
    directory: Path,
    num_iterations: int,
    *,
    keep: int = 3,
    store: CheckpointStore | None = None,
    dim: int = 8,
    save_every: int = SAVE_EVERY_STEPS,
) -> LoopSetup:
    """The parts of a loop whose checkpoints are in `directory/checkpoints`: a best one at every second of them."""
    torch.set_num_threads(1)
    generator = np.random.default_rng(3)
    sources = [generator.integers(4, VOCAB, generator.integers(1, 13)).tolist() for _ in range(64)]
    dataset = DistillationDataset(sources, [source[::-1] for source in sources])
    config = ModelConfig.model_validate(MODEL | {"dim": dim, "feed_forward_dim": 2 * dim})
    student, teacher = CvmTransformer(config, VOCAB), CvmTransformer(config, VOCAB)
    init_random(student, 0)
    init_random(teacher, 1)
    settings = TrainingConfig(
        num_iterations=num_iterations,
        batch_size=8,
        warmup_steps=2,
        learning_rate=5e-3,
        precision="float32",
        ema_decay=0.8,
        checkpoint_every_steps=save_every,
    )
    seed_everything(7)
    return LoopSetup(
        stage="distil",
        settings=settings,
        guard=GuardConfig(),
        model=student,
        objective=DistillationObjective(student, DistillationLoss(2.0, 0.7, 0.3), teacher),
        dataset=dataset,
        batches=BatchSchedule(dataset.lengths, settings.batch_size, seed=5),
        store=store or CheckpointStore(directory / "checkpoints", keep, report=lambda line: None),
        events=EventWriter(directory / "events.jsonl"),
        judge=Content(),
        stop=StopRequest(),
        device=torch.device("cpu"),
        validate_every_steps=2 * save_every,
        num_threads=1,
    )


def build_loop(directory: Path, num_iterations: int, **options: Any) -> TrainingLoop:
    """A loop of `build_setup`: by default a checkpoint every 2 steps, and a best one every 4."""
    return TrainingLoop(build_setup(directory, num_iterations, **options))


def train(directory: Path, num_iterations: int, *, keep: int = 3) -> TrainingLoop:
    """Train, or carry on, to a step; the loop as it is then."""
    loop = build_loop(directory, num_iterations, keep=keep)
    try:
        loop.run()
    finally:
        loop.setup.events.close()
    return loop


def describe_state(loaded: LoadedCheckpoint) -> dict[str, Any]:
    """A checkpoint's whole content in a form that compares equal only when every bit is."""

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return [str(value.dtype), list(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes()]
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    state = {"tensors": loaded.tensors, "torch_states": loaded.torch_states, "plain": loaded.plain}
    return {"step": loaded.step, "attempt": loaded.attempt, "is_best": loaded.is_best, **plain(state)}
