"""One optimizer step: the gradient of the whole batch however it is cut, and what never reaches the weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch

from cvm_translator.config.schema import FaultInjection, TrainingConfig
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.losses.distillation import DistillationLoss
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.training.faults import corrupt_teacher
from cvm_translator.training.objectives import DistillationObjective
from cvm_translator.training.optimizer import MovingAverage, build_optimizer
from cvm_translator.training.spikes import MIN_HISTORY, SpikeWindow
from cvm_translator.training.step import StepResult, train_step

Step = Callable[..., StepResult]
INDICES = [0, 7, 3, 21, 45, 8, 60, 33, 2, 17, 80]


def settings(**changes: object) -> TrainingConfig:
    plain = {"num_iterations": 10, "batch_size": 16, "warmup_steps": 0, "precision": "float32", "max_grad_norm": 1e9}
    return TrainingConfig(**(plain | changes))  # type: ignore[arg-type]


def run_step(
    model: CvmTransformer,
    teacher: CvmTransformer,
    dataset: DistillationDataset,
    *,
    alpha: float = 0.7,
    beta: float = 0.3,
    smoothing: float = 0.0,
    spikes: SpikeWindow | None = None,
    faults: list[FaultInjection] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    average: MovingAverage | None = None,
    learning_rate: float = 1e-2,
    **changes: object,
) -> StepResult:
    chosen = settings(**changes)
    loss = DistillationLoss(2.0, alpha, beta, smoothing)
    return train_step(
        model,
        DistillationObjective(model, loss, teacher if loss.needs_teacher else None),
        optimizer or build_optimizer(model, chosen),
        dataset.batch(INDICES),
        chosen,
        spikes or SpikeWindow(50, 20.0),
        learning_rate=learning_rate,
        average=average,
        faults=faults,
    )


def gradients(model: CvmTransformer) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(("alpha", "beta", "smoothing"), [(0.7, 0.3, 0.1), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0)])
@pytest.mark.parametrize("parts", [2, 3, 11])
def test_accumulation_changes_no_gradient(
    alpha: float,
    beta: float,
    smoothing: float,
    parts: int,
    make_model: Callable[..., CvmTransformer],
    teacher: CvmTransformer,
    dataset: DistillationDataset,
) -> None:
    """1xN and Nx1, in float64, on micro-batches whose token counts differ; also loss, accuracy and gradient norm."""
    counts = {piece.num_tokens for piece in dataset.batch(INDICES).split(parts)}
    assert len(counts) > 1
    results, found = [], []
    for cuts in (1, parts):
        model = make_model().double().eval()  # without dropout, which draws differently for other shapes
        teacher.double()
        results.append(
            run_step(
                model, teacher, dataset, alpha=alpha, beta=beta, smoothing=smoothing, grad_accum_steps=cuts,
                learning_rate=0.0,
            )
        )  # fmt: skip
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() == dict(model.named_parameters()).keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-9, atol=1e-12)
    whole, cut = results
    assert (whole.num_tokens, whole.accuracy) == (cut.num_tokens, cut.accuracy)
    for field in ("loss", "distillation_loss", "task_loss", "grad_norm"):
        assert getattr(whole, field) == pytest.approx(getattr(cut, field), rel=1e-6)  # totals are kept in float32


def test_loss_is_the_mean_over_real_tokens(
    make_model: Callable[..., CvmTransformer], teacher: CvmTransformer, dataset: DistillationDataset
) -> None:
    model = make_model().eval()
    batch = dataset.batch(INDICES)
    hidden, matrix = model(batch.src, batch.src_mask, batch.tgt_in)
    logits = (hidden @ matrix.T).flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch.tgt_out.flatten(), ignore_index=1)
    result = run_step(model, teacher, dataset, alpha=0.0, beta=1.0)
    assert result.loss == pytest.approx(expected.item(), rel=1e-5)
    real = batch.tgt_out.flatten() != 1
    correct = (logits.argmax(-1) == batch.tgt_out.flatten())[real].float().mean().item()
    assert result.accuracy == pytest.approx(correct)
    assert result.num_tokens == int(real.sum())


def test_gradients_are_clipped_and_the_norm_is_told_before(
    make_model: Callable[..., CvmTransformer], teacher: CvmTransformer, dataset: DistillationDataset
) -> None:
    model = make_model().eval()
    result = run_step(model, teacher, dataset, max_grad_norm=0.01)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients(model).values()))
    assert result.grad_norm > 0.05
    assert norm == pytest.approx(0.01, rel=1e-3)


def spoil_loss(_: CvmTransformer) -> list[FaultInjection]:
    return [FaultInjection(kind="nan_loss", from_step=1)]


def spoil_gradient(model: CvmTransformer) -> list[FaultInjection]:
    """The loss stays finite; one gradient overflows."""
    model.decoder_norm.weight.register_hook(lambda grad: grad * math.inf)
    return []


def spoil_nothing(_: CvmTransformer) -> list[FaultInjection]:
    return []


@pytest.mark.parametrize(
    ("spoil", "reason", "history"),
    [
        (spoil_loss, "loss is not finite", []),
        (spoil_gradient, "gradient is not finite", []),
        (spoil_nothing, "loss spike", [0.001] * MIN_HISTORY),
    ],
)
def test_a_bad_batch_moves_nothing(
    spoil: Callable[[CvmTransformer], list[FaultInjection]],
    reason: str,
    history: list[float],
    make_model: Callable[..., CvmTransformer],
    teacher: CvmTransformer,
    dataset: DistillationDataset,
) -> None:
    """Neither weights nor moments nor the average nor the window; and the step after it is as if it had not been."""
    model = make_model().eval()
    optimizer = build_optimizer(model, settings())
    average = MovingAverage(model, 0.9)
    run_step(model, teacher, dataset, optimizer=optimizer, average=average)
    twin = copy.deepcopy(model)
    twin_optimizer = build_optimizer(twin, settings())
    twin_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    spikes = SpikeWindow(50, 20.0)
    for loss in history:
        spikes.add(loss)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), average.tensors, spikes.state_dict()))

    faults = spoil(model)
    result = run_step(model, teacher, dataset, optimizer=optimizer, average=average, spikes=spikes, faults=faults)
    assert result.rejected == reason
    after = (model.state_dict(), optimizer.state_dict(), average.tensors, spikes.state_dict())
    for old, new in zip(flatten(before), flatten(after), strict=True):
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new

    model.decoder_norm.weight._backward_hooks = None
    assert run_step(model, teacher, dataset, optimizer=optimizer).rejected is None
    run_step(twin, teacher, dataset, optimizer=twin_optimizer)
    for old, new in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new)


def flatten(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for key in value for leaf in (key, *flatten(value[key]))]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in flatten(item)]
    return [value]


def test_shuffled_targets_give_each_source_its_neighbours(
    make_model: Callable[..., CvmTransformer], teacher: CvmTransformer, dataset: DistillationDataset
) -> None:
    fault = [FaultInjection(kind="shuffled_targets", from_step=1)]
    honest = run_step(make_model().eval(), teacher, dataset)
    shuffled = run_step(make_model().eval(), teacher, dataset, faults=fault)
    assert shuffled.num_tokens == honest.num_tokens
    assert shuffled.loss != honest.loss


def test_a_garbage_teacher_recommends_other_words_while_the_fault_lasts(
    make_model: Callable[..., CvmTransformer], teacher: CvmTransformer, dataset: DistillationDataset
) -> None:
    model = make_model().eval()
    objective = DistillationObjective(model, DistillationLoss(2.0, 0.7, 0.3), teacher)
    batch = dataset.batch(INDICES)
    honest = objective(batch, batch.num_tokens)
    corrupt_teacher([FaultInjection(kind="garbage_teacher", from_step=1)], objective)
    spoilt = objective(batch, batch.num_tokens)
    assert spoilt.task == honest.task
    assert spoilt.distillation != honest.distillation
    corrupt_teacher([], objective)
    assert objective(batch, batch.num_tokens).distillation == honest.distillation


def test_weight_noise_is_as_large_as_it_says(
    make_model: Callable[..., CvmTransformer], teacher: CvmTransformer, dataset: DistillationDataset
) -> None:
    honest, noisy = make_model().eval(), make_model().eval()
    run_step(honest, teacher, dataset)
    run_step(noisy, teacher, dataset, faults=[FaultInjection(kind="weight_noise", from_step=1, factor=0.5)])
    noise = noisy.embedding.matrix() - honest.embedding.matrix()
    assert noise.std().item() == pytest.approx(0.5 * honest.embedding.matrix().std().item(), rel=0.1)
    assert torch.equal(noisy.decoder_norm.weight, honest.decoder_norm.weight)
