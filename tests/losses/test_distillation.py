"""The distillation loss and its closed-form gradient against PyTorch's own losses, and under accumulation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from cvm_translator.losses import DistillationLoss, compute_gradient_ratio, distillation

N, D, V, TEACHER_D = 23, 12, 37, 20


def make_batch(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    targets = torch.randint(0, V, (N,), generator=generator)
    return draw(N, D).requires_grad_(), draw(V, D).requires_grad_(), targets, draw(N, TEACHER_D), draw(V, TEACHER_D)


def compute_reference(batch: tuple[Tensor, ...], temperature: float, smoothing: float) -> tuple[Tensor, Tensor]:
    """T² · KL and cross-entropy as sums, by PyTorch's own functions."""
    hidden, matrix, targets, teacher_hidden, teacher_matrix = batch
    student, teacher = hidden @ matrix.T, teacher_hidden @ teacher_matrix.T
    divergence = functional.kl_div(
        functional.log_softmax(student / temperature, -1),
        functional.softmax(teacher / temperature, -1),
        reduction="sum",
    )
    task = functional.cross_entropy(student, targets, reduction="sum", label_smoothing=smoothing)
    return temperature**2 * divergence, task


def compute_ours(loss: DistillationLoss, batch: tuple[Tensor, ...], num_tokens: float):
    hidden, matrix, targets, teacher_hidden, teacher_matrix = batch
    return loss(
        hidden, matrix, targets, num_tokens=num_tokens, teacher_hidden=teacher_hidden, teacher_matrix=teacher_matrix
    )


def cut_small(monkeypatch):
    """Three chunks of up to 9 tokens, in blocks of 5 and tiles of 10 rows of the matrix."""
    monkeypatch.setitem(distillation._BLOCK_ELEMENTS, "cpu", 5 * V)
    monkeypatch.setitem(distillation._CHUNK_ELEMENTS, "cpu", 9 * V)
    monkeypatch.setitem(distillation._TILE_ROWS, "cpu", 10)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 6.0])
@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.2), (1.0, 0.0), (0.0, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("is_cut", [False, True])
def test_value_and_gradient(monkeypatch, temperature, alpha, beta, smoothing, is_cut):
    if is_cut:
        cut_small(monkeypatch)
    batch, twin = make_batch(), make_batch()
    parts = compute_ours(DistillationLoss(temperature, alpha, beta, smoothing), batch, num_tokens=50.0)
    divergence, task = compute_reference(twin, temperature, smoothing)
    reference = (alpha * divergence + beta * task) / 50.0
    torch.testing.assert_close(parts.total, reference)
    torch.testing.assert_close(parts.task, task / 50.0)
    if alpha:
        torch.testing.assert_close(parts.distillation, divergence / 50.0)
    student = twin[0] @ twin[1].T
    assert parts.num_correct.item() == (student.argmax(-1) == twin[2]).sum().item()
    (parts.total * 3.0).backward()
    (reference * 3.0).backward()
    torch.testing.assert_close(batch[0].grad, twin[0].grad)
    torch.testing.assert_close(batch[1].grad, twin[1].grad)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "js"])
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_gradcheck(monkeypatch, divergence, beta):
    cut_small(monkeypatch)
    hidden, matrix, targets, teacher_hidden, teacher_matrix = make_batch()
    loss = DistillationLoss(2.5, 0.7, beta, 0.1, divergence)

    def run(hidden: Tensor, matrix: Tensor) -> Tensor:
        return compute_ours(loss, (hidden, matrix, targets, teacher_hidden, teacher_matrix), 7.0).total

    assert torch.autograd.gradcheck(run, (hidden, matrix))


@pytest.mark.parametrize("asked", [0, 1])
def test_one_gradient_alone_is_the_same(monkeypatch, asked):
    cut_small(monkeypatch)
    both, one = make_batch(), make_batch()
    one[1 - asked].requires_grad_(False)
    for batch in (both, one):
        compute_ours(DistillationLoss(2.0, 0.8, 0.2), batch, N).total.backward()
    assert torch.equal(one[asked].grad, both[asked].grad) and one[1 - asked].grad is None


class LargestTensor(TorchDispatchMode):
    """Sees the number of elements of every result."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return result


def test_the_logits_of_all_tokens_never_exist_together(monkeypatch):
    monkeypatch.setitem(distillation._CHUNK_ELEMENTS, "cpu", 4 * V)
    with LargestTensor() as seen:
        compute_ours(DistillationLoss(2.0, 0.8, 0.2), make_batch(), N).total.backward()
    assert seen.num_elements == V * TEACHER_D < N * V


class Memory(TorchDispatchMode):
    """Where logits are written, what is made of which shape and type, and what is scaled whole."""

    def __init__(self) -> None:
        super().__init__()
        self.logits: dict[int, int] = {}
        self.num_products = 0
        self.made: set[tuple[torch.dtype, tuple[int, ...]]] = set()
        self.scaled: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.out:
            storage = result.untyped_storage()
            self.logits[storage.data_ptr()] = storage.nbytes() // result.element_size()
            self.num_products += 1
        if isinstance(result, torch.Tensor):
            self.made.add((result.dtype, tuple(result.shape)))
        if func is torch.ops.aten.mul.Tensor:
            self.scaled.add(tuple(result.shape))
        return result


def test_one_chunks_logits_live_at_a_time_and_no_gradient_is_copied(monkeypatch):
    monkeypatch.setitem(distillation._CHUNK_ELEMENTS, "cpu", 4 * V)
    batch = make_batch()
    with Memory() as seen:
        compute_ours(DistillationLoss(2.0, 0.8, 0.2), batch, N).total.backward()
    assert seen.num_products == 2 * math.ceil(N / 4) and [*seen.logits.values()] == [4 * V] * 2
    assert not {tuple(leaf.shape) for leaf in batch[:2]} & seen.scaled


def test_neither_a_matrix_nor_its_gradient_is_copied_whole_in_the_type_of_the_products(monkeypatch):
    tile = 10
    monkeypatch.setitem(distillation._TILE_ROWS, "cpu", tile)
    batch = make_batch(torch.float32)
    with torch.autocast("cpu", torch.bfloat16), Memory() as seen:
        compute_ours(DistillationLoss(2.0, 0.8, 0.2), batch, N).total.backward()
    narrow = {shape for dtype, shape in seen.made if dtype == torch.bfloat16}
    for matrix in (batch[1], batch[4]):
        assert tuple(matrix.shape) not in narrow
        assert (tile, matrix.shape[1]) in narrow


@pytest.mark.parametrize("tile", [1, 3, V - 1, V + 1, None])
def test_rows_a_tile_change_nothing(tile, monkeypatch):
    def compute(rows):
        monkeypatch.setattr(distillation, "_TILE_ROWS", {} if rows is None else {"cpu": rows})  # {}: as on CUDA
        batch = make_batch()
        parts = compute_ours(DistillationLoss(2.0, 0.8, 0.2, 0.1), batch, N)
        parts.total.backward()
        return *parts, batch[0].grad, batch[1].grad

    for ours, whole in zip(compute(tile), compute(V), strict=True):
        torch.testing.assert_close(ours, whole)


def test_a_gradient_of_bfloat16_is_added_up_in_float32(monkeypatch):
    monkeypatch.setitem(distillation._TILE_ROWS, "cpu", 1)
    monkeypatch.setitem(distillation._CHUNK_ELEMENTS, "cpu", V)
    monkeypatch.setitem(distillation._UNDIVIDED_CHUNKS, "cpu", 1)
    num_tokens = 1000  # summands of one sign: in bfloat16 their sum would stop growing at some 256 of them
    hidden = torch.full((num_tokens, 1), 0.5, dtype=torch.bfloat16)
    matrix = torch.zeros(V, 1, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.zeros(num_tokens, dtype=torch.long)
    DistillationLoss(1.0, 0.0, 1.0)(hidden, matrix, targets, num_tokens=num_tokens).total.backward()
    expected = torch.full((V, 1), 0.5 / V)
    expected[0] -= 0.5
    assert matrix.grad.dtype == torch.bfloat16
    torch.testing.assert_close(matrix.grad.float(), expected, rtol=0.02, atol=0.0)


def test_a_batch_without_tokens_has_a_loss_and_gradients_of_zero():
    hidden, matrix, targets, teacher_hidden, teacher_matrix = make_batch()
    batch = hidden[:0], matrix, targets[:0], teacher_hidden[:0], teacher_matrix
    total = compute_ours(DistillationLoss(2.0, 0.8, 0.2), batch, 1).total
    total.backward()
    assert total == 0.0 and not matrix.grad.any()


def test_float32_is_close_to_float64_also_for_large_logits():
    wide, narrow = make_batch(), make_batch(torch.float32)
    loss = DistillationLoss(2.0, 0.8, 0.2)
    with torch.no_grad():
        for batch in (wide, narrow):
            batch[0].mul_(10.0)
            batch[3].mul_(10.0)
    expected, actual = compute_ours(loss, wide, N), compute_ours(loss, narrow, N)
    for ours, theirs in zip(actual[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_a_student_equal_to_its_teacher_has_no_distillation_loss():
    hidden, matrix, targets, _, _ = make_batch(torch.float32)
    parts = DistillationLoss(3.0, 1.0, 0.0)(
        hidden, matrix, targets, num_tokens=N, teacher_hidden=hidden.detach(), teacher_matrix=matrix.detach()
    )
    parts.total.backward()
    assert abs(parts.total.item()) < 1e-4
    assert hidden.grad.abs().max() < 1e-5


def test_accumulation_over_unequal_token_counts_equals_the_whole_batch():
    loss = DistillationLoss(2.0, 0.8, 0.2, 0.1)
    whole, cut = make_batch(), make_batch()
    compute_ours(loss, whole, num_tokens=N).total.backward()
    totals = 0.0
    for rows in (slice(0, 2), slice(2, 17), slice(17, N)):
        hidden, matrix, targets, teacher_hidden, teacher_matrix = cut
        part = compute_ours(loss, (hidden[rows], matrix, targets[rows], teacher_hidden[rows], teacher_matrix), N)
        part.total.backward()
        totals += part.total.item()
    assert totals == pytest.approx(compute_ours(loss, whole, N).total.item())
    torch.testing.assert_close(cut[0].grad, whole[0].grad)
    torch.testing.assert_close(cut[1].grad, whole[1].grad)


def test_autocast_multiplies_in_bfloat16_and_keeps_float32_gradients():
    batch, twin = make_batch(torch.float32), make_batch(torch.float32)
    loss = DistillationLoss(2.0, 0.8, 0.2)
    exact = compute_ours(loss, twin, N)
    with torch.autocast("cpu", torch.bfloat16):
        parts = compute_ours(loss, batch, N)
    assert parts.total.dtype == torch.float32
    assert parts.total.item() == pytest.approx(exact.total.item(), rel=0.02)
    parts.total.backward()
    exact.total.backward()
    assert batch[0].grad.dtype == torch.float32
    assert (batch[1].grad - twin[1].grad).norm() < 0.02 * twin[1].grad.norm()


def test_task_alone_needs_no_teacher():
    hidden, matrix, targets, _, _ = make_batch()
    parts = DistillationLoss(6.0, 0.0, 1.0)(hidden, matrix, targets, num_tokens=N)
    torch.testing.assert_close(parts.total, functional.cross_entropy(hidden @ matrix.T, targets))
    assert parts.distillation.item() == 0.0


def test_nan_is_not_hidden():
    batch = make_batch()
    with torch.no_grad():
        batch[0][3, 1] = math.nan
    assert math.isnan(compute_ours(DistillationLoss(2.0, 0.5, 0.5), batch, N).total.item())


def test_bad_calls_are_refused():
    hidden, matrix, targets, teacher_hidden, teacher_matrix = make_batch()
    loss = DistillationLoss(2.0, 0.8, 0.2)
    with pytest.raises(ValueError, match="teacher"):
        loss(hidden, matrix, targets, num_tokens=N)
    with pytest.raises(ValueError, match="vocabulary"):
        loss(hidden, matrix, targets, num_tokens=N, teacher_hidden=teacher_hidden, teacher_matrix=teacher_matrix[:-1])
    with pytest.raises(ValueError, match="needed"):
        loss(hidden, matrix, targets[1:], num_tokens=N, teacher_hidden=teacher_hidden, teacher_matrix=teacher_matrix)
    with pytest.raises(ValueError, match="temperature"):
        DistillationLoss(0.0, 0.8, 0.2)


@pytest.mark.parametrize("elements", [1 << 22, 5 * V])
def test_gradient_ratio_and_effective_targets(monkeypatch, elements):
    monkeypatch.setattr(distillation, "_BALANCE_ELEMENTS", elements)
    batch = make_batch()
    alpha, beta, temperature = 0.8, 0.2, 4.0
    with LargestTensor() as seen:
        balance = compute_gradient_ratio(DistillationLoss(temperature, alpha, beta), *batch)
    assert seen.num_elements == (N * V if elements > N * V else V * TEACHER_D)
    student = (batch[0] @ batch[1].T).detach().requires_grad_()
    teacher = (batch[3] @ batch[4].T) / temperature
    divergence = functional.kl_div(
        functional.log_softmax(student / temperature, -1), teacher.softmax(-1), reduction="sum"
    )
    (of_distillation,) = torch.autograd.grad(alpha * temperature**2 * divergence, student)
    (of_task,) = torch.autograd.grad(beta * functional.cross_entropy(student, batch[2], reduction="sum"), student)
    assert balance.gradient_ratio == pytest.approx((of_distillation.norm() / of_task.norm()).item())
    entropy = torch.distributions.Categorical(logits=teacher).entropy().mean()
    assert balance.effective_targets == pytest.approx(math.exp(entropy.item()))
    uniform = compute_gradient_ratio(DistillationLoss(1e6, alpha, beta), *batch)
    assert uniform.effective_targets == pytest.approx(V, rel=1e-4)
