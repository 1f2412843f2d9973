"""The loss curve of the product's own loss against that of the formula as it is usually written, step by step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from cvm_translator.config.schema import TrainingConfig
from cvm_translator.corpus.batches import BatchSchedule
from cvm_translator.corpus.dataset import Batch, DistillationDataset
from cvm_translator.losses import DistillationLoss, LossParts
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.training.objectives import DistillationObjective, Objective, find_real_targets
from cvm_translator.training.optimizer import build_optimizer
from cvm_translator.training.spikes import SpikeWindow
from cvm_translator.training.step import train_step

TEMPERATURE, ALPHA, BETA, SMOOTHING = 2.0, 0.7, 0.3, 0.1
NUM_STEPS = 20


class NaiveObjective:
    """The whole logits in float32, PyTorch's own losses, and autograd."""

    def __init__(self, student: CvmTransformer, teacher: CvmTransformer) -> None:
        self.student, self.teacher = student, teacher.eval()

    def __call__(self, batch: Batch, num_tokens: int) -> LossParts:
        real = find_real_targets(batch)
        targets = batch.tgt_out.flatten()[real]
        student = self._compute_logits(self.student, batch)[real]
        with torch.no_grad():
            teacher = self._compute_logits(self.teacher, batch)[real]
        divergence = functional.kl_div(
            (student / TEMPERATURE).log_softmax(-1), (teacher / TEMPERATURE).softmax(-1), reduction="sum"
        )
        distillation = TEMPERATURE**2 * divergence / num_tokens
        task = functional.cross_entropy(student, targets, reduction="sum", label_smoothing=SMOOTHING) / num_tokens
        num_correct = (student.argmax(-1) == targets).sum()
        return LossParts(ALPHA * distillation + BETA * task, distillation, task, num_correct)

    @staticmethod
    def _compute_logits(model: CvmTransformer, batch: Batch) -> torch.Tensor:
        hidden, matrix = model(batch.src, batch.src_mask, batch.tgt_in)
        logits: torch.Tensor = (hidden @ matrix.T).flatten(0, 1)
        return logits


def train(
    model: CvmTransformer, objective: Objective, dataset: DistillationDataset, grad_accum_steps: int
) -> list[tuple[float, ...]]:
    """Loss, both terms and gradient norm of each step."""
    torch.set_num_threads(1)
    torch.manual_seed(5)  # of dropout
    settings = TrainingConfig(
        num_iterations=NUM_STEPS, batch_size=16, warmup_steps=0, precision="float32", grad_accum_steps=grad_accum_steps
    )
    optimizer, spikes = build_optimizer(model, settings), SpikeWindow(50, 20.0)
    schedule = BatchSchedule(dataset.lengths, settings.batch_size, seed=5)
    curve = []
    for _ in range(NUM_STEPS):
        batch = dataset.batch(schedule.next())
        found = train_step(model, objective, optimizer, batch, settings, spikes, learning_rate=5e-3)
        assert found.rejected is None
        curve.append((found.loss, found.distillation_loss, found.task_loss, found.grad_norm))
    return curve


@pytest.mark.parametrize("grad_accum_steps", [1, 3])
def test_the_curve_is_that_of_the_naive_formula(
    grad_accum_steps: int,
    make_model: Callable[..., CvmTransformer],
    teacher: CvmTransformer,
    dataset: DistillationDataset,
) -> None:
    student, twin = make_model().train(), make_model().train()
    loss = DistillationLoss(TEMPERATURE, ALPHA, BETA, SMOOTHING)
    ours = train(student, DistillationObjective(student, loss, teacher), dataset, grad_accum_steps)
    naive = train(twin, NaiveObjective(twin, teacher), dataset, grad_accum_steps)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(naive), rtol=2e-4, atol=0.0)
    assert ours[-1][0] < 0.9 * ours[0][0]  # something was learnt, so a wrong gradient would show
