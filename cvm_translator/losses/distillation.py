"""The distillation loss: alpha · T² · D(teacher_T, student_T) + beta · CE, over real target tokens.

D is KL(teacher ‖ student) unless another of `divergences.py` is chosen.

Both terms are sums over the tokens given, divided by `num_tokens`, the tokens of the whole effective batch:
micro-batches of unequal token counts then add up to exactly the gradient of the whole batch. (Hinton et al., 2015,
arXiv:1503.02531; T² keeps the size of the distillation gradient comparable across temperatures.)

The gradient with respect to the student's logits has a closed form, with KL(teacher ‖ student)

    alpha · T · (p_student^T − p_teacher^T) + beta · (p_student − y),   y the (smoothed) reference,

so the forward pass computes it at once, a chunk of tokens at a time: the chunk's logits, the gradient written over
them, and from it the gradients of the hidden states and of the matrix (a float32 sum over the chunks). At most one
chunk's logits of the student and of the teacher exist together, and nothing of size N × V waits for the backward pass,
which hands out what is there (the idea is that of Liger Kernel, Hsu et al., 2024, arXiv:2410.10989). On a CPU the
matrices are gone through some rows at a time, so that neither their copies in the type of the products nor the products
that are added up (also in float32) exist as a whole, and both are still in the processor's cache when used. Softmax
maths is in float32 (float64 for float64 input) on blocks of rows that stay in the processor's cache, or on CUDA in one
kernel (see `one_kernel`). Logits are products in autocast's type where autocast is on.

Refuses: shapes that do not match, targets without a teacher where alpha > 0. NaN in, NaN out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cvm_translator.config.compilers import HAS_TRITON
from cvm_translator.config.schema import DivergenceName
from cvm_translator.losses.divergences import DIVERGENCES
from cvm_translator.losses.top_targets import TopTargets

_BLOCK_ELEMENTS = {"cpu": 1 << 18}
"""Logits handled together, by device type; 1 MiB of float32 on a CPU."""
_DEFAULT_BLOCK_ELEMENTS = 1 << 26
_CHUNK_ELEMENTS = {"cpu": 1 << 23}
"""Logits of one chunk of tokens, by device type: 16 MiB of bfloat16 on a CPU. Smaller ones would add up the matrix's
gradient more often."""
_DEFAULT_CHUNK_ELEMENTS = 1 << 27
_UNDIVIDED_CHUNKS = {"cpu": 2}
"""Up to so many chunks stay one, by device type: a chunk reads the matrices anew, and a usual batch on a CPU, of some
hundred tokens, is to do so once."""
_TILE_ROWS = {"cpu": 2048}
"""Rows of a matrix (V, D) that are multiplied at once, by device type; elsewhere all."""
_BALANCE_ELEMENTS = 1 << 22
"""Logits that `compute_gradient_ratio` handles together: some 16 MiB tensors of float32."""


class LossParts(NamedTuple):
    """total = alpha · distillation + beta · task; only `total` carries a gradient."""

    total: Tensor
    distillation: Tensor
    """T² · D, without its weight."""
    task: Tensor
    """Cross-entropy, without its weight."""
    num_correct: Tensor
    """Tokens to which nothing is preferred over the target (int64; ties count, which bfloat16 logits have)."""


def compute_logits(hidden: Tensor, matrix: Tensor) -> Tensor:
    """hidden (N, D) @ matrix (V, D).T in autocast's type if autocast is on, else in their own."""
    return _to_product_type(hidden) @ _to_product_type(matrix).t()


def _to_product_type(values: Tensor) -> Tensor:
    return values.to(_find_product_type(values))


def _find_product_type(values: Tensor) -> torch.dtype:
    device_type = values.device.type
    if torch.is_autocast_enabled(device_type) and values.dtype != torch.float64:
        return torch.get_autocast_dtype(device_type)
    return values.dtype


def _chunk_rows(matrix: Tensor, num_tokens: int) -> int:
    """The same number in every chunk, or nearly."""
    most = max(1, _CHUNK_ELEMENTS.get(matrix.device.type, _DEFAULT_CHUNK_ELEMENTS) // matrix.shape[0])
    if num_tokens <= _UNDIVIDED_CHUNKS.get(matrix.device.type, 1) * most:
        return max(1, num_tokens)
    return math.ceil(num_tokens / math.ceil(num_tokens / most))


def _block_rows(logits: Tensor) -> int:
    return max(1, _BLOCK_ELEMENTS.get(logits.device.type, _DEFAULT_BLOCK_ELEMENTS) // logits.shape[1])


def _wide(values: Tensor) -> Tensor:
    return values.to(_wide_type(values))


def _wide_type(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class _Matrix:
    """An output matrix (V, D) in the type of the product, a tile of rows at a time."""

    weights: Tensor
    dtype: torch.dtype
    tile_rows: int

    @classmethod
    def of(cls, weights: Tensor) -> _Matrix:
        dtype = _find_product_type(weights)
        if tile_rows := _TILE_ROWS.get(weights.device.type):
            return cls(weights, dtype, tile_rows)
        return cls(weights.to(dtype), dtype, weights.shape[0])

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        for rows in _slices(self.weights.shape[0], self.tile_rows):
            yield rows, self.weights[rows].to(self.dtype)

    def new_logits(self, num_tokens: int) -> Tensor:
        """Memory for a chunk's, (n, V), which all chunks share: memory new from the system is slow to write."""
        num_rows = _chunk_rows(self.weights, num_tokens)
        return self.weights.new_empty(num_rows, self.weights.shape[0], dtype=self.dtype)

    def multiply(self, hidden: Tensor, memory: Tensor) -> Tensor:
        """hidden (n, D) -> logits (n, V), in the first rows of `memory`."""
        logits = memory[: hidden.shape[0]]
        for rows, tile in self.tiles():
            torch.mm(hidden, tile.t(), out=logits[:, rows])
        return logits


@dataclass(frozen=True)
class _Teacher:
    """What the teacher's tempered logits of a chunk are made from."""

    hidden: Tensor
    """(N, D')."""
    matrix: _Matrix
    temperature: float
    memory: Tensor

    def __getitem__(self, rows: slice) -> Tensor:
        """(n, V) tempered logits, until the next are asked for."""
        return self.matrix.multiply((self.hidden[rows] / self.temperature).to(self.matrix.dtype), self.memory)


class _TaskAndDistillation(torch.autograd.Function):
    """(hidden, matrix, …) -> sums (T²·D, CE, correct) and the weighted total; see the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        matrix: Tensor,
        targets: Tensor,
        teacher: _Teacher | TopTargets | None,
        settings: DistillationLoss,
        num_tokens: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        leaves = hidden, matrix
        sums = tuple(
            torch.empty_like(leaf, dtype=_wide_type(leaf)) if is_needed else None
            for leaf, is_needed in zip(leaves, ctx.needs_input_grad, strict=False)
        )
        tiled = _Matrix.of(matrix)
        memory = tiled.new_logits(hidden.shape[0])
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in _slices(hidden.shape[0], len(memory)):
                inputs = hidden[chunk].to(tiled.dtype)
                logits = tiled.multiply(inputs, memory)
                known = None if teacher is None else teacher[chunk]
                parts += _write_gradients(settings, logits, targets[chunk], known)
                _add_gradients(sums, chunk, logits, inputs, tiled)
        distillation, task, num_correct = (torch.stack(part).sum() for part in zip(*parts, strict=True))
        total = (settings.alpha * distillation + settings.beta * task) / num_tokens
        ctx.save_for_backward(
            *(
                None if gradient is None else gradient.mul_(1.0 / num_tokens).to(leaf.dtype)
                for gradient, leaf in zip(sums, leaves, strict=True)
            )
        )
        ctx.mark_non_differentiable(distillation, task, num_correct)
        return total, distillation, task, num_correct

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grads, scale = ctx.saved_tensors, grad_outputs[0]
        if scale.device.type != "cpu" or scale.item() != 1.0:  # elsewhere to look at it would be to wait for it
            grads = [None if grad is None else grad * scale for grad in grads]
        return *grads, None, None, None, None


def _add_gradients(
    sums: tuple[Tensor | None, ...], chunk: slice, logits: Tensor, inputs: Tensor, matrix: _Matrix
) -> None:
    """Write those of a chunk's hidden states and add that of the matrix, from the logits' (n, V)."""
    grad_hidden, grad_matrix = sums
    if grad_hidden is None and grad_matrix is None:
        return
    for rows, tile in matrix.tiles():
        if grad_hidden is not None:
            _add(grad_hidden[chunk], logits[:, rows] @ tile, is_first=rows.start == 0)
        if grad_matrix is not None:
            _add(grad_matrix[rows], logits[:, rows].t() @ inputs, is_first=chunk.start == 0)


def _add(total: Tensor, values: Tensor, is_first: bool) -> None:
    total.copy_(values) if is_first else total.add_(values)


def _write_gradients(
    settings: DistillationLoss, logits: Tensor, targets: Tensor, teacher: Tensor | TopTargets | None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The sums of each block of a chunk's rows, and the gradient written over its logits."""
    is_possible = HAS_TRITON and logits.device.type == "cuda" and logits.dtype != torch.float64
    if is_possible and not isinstance(teacher, TopTargets):
        return [settings.write_gradient_in_one_kernel(logits, targets, teacher)]
    return [
        settings.write_gradient(logits[rows], targets[rows], None if teacher is None else teacher[rows])
        for rows in _slices(logits.shape[0], _block_rows(logits))
    ]


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, max(length, 1), size)]


class DistillationLoss:
    """See the module's docstring. With alpha = 0 it is the cross-entropy alone and needs no teacher."""

    def __init__(
        self,
        temperature: float,
        alpha: float,
        beta: float,
        label_smoothing: float = 0.0,
        divergence: DivergenceName = "forward_kl",
    ) -> None:
        if not (temperature > 0 and alpha >= 0 and beta >= 0 and 0 <= label_smoothing < 1):
            raise ValueError(
                f"temperature {temperature} must be positive, alpha {alpha} and beta {beta} at least 0, "
                f"label_smoothing {label_smoothing} in [0, 1)"
            )
        if divergence not in DIVERGENCES:
            raise ValueError(f"unknown divergence {divergence!r}: known are {', '.join(DIVERGENCES)}")
        self.temperature, self.alpha, self.beta = temperature, alpha, beta
        self.label_smoothing, self.divergence = label_smoothing, divergence

    @property
    def needs_teacher(self) -> bool:
        return self.alpha > 0

    def __call__(
        self,
        student_hidden: Tensor,
        student_matrix: Tensor,
        targets: Tensor,
        *,
        num_tokens: float,
        teacher_hidden: Tensor | None = None,
        teacher_matrix: Tensor | None = None,
        top_targets: TopTargets | None = None,
    ) -> LossParts:
        """Student hidden (N, D) and matrix (V, D), targets (N,) ids, teacher hidden (N, D') and matrix (V, D').

        `top_targets` of the N positions, at this loss's temperature, take the place of the teacher's two.
        """
        _check_shapes(student_hidden, student_matrix, targets)
        teacher: _Teacher | TopTargets | None = None
        if self.needs_teacher and top_targets is not None:
            if top_targets.indices.shape != top_targets.log_probs.shape or len(top_targets.indices) != len(targets):
                raise ValueError(
                    f"top targets of {tuple(top_targets.indices.shape)} and {tuple(top_targets.log_probs.shape)} are"
                    f" not those of {len(targets)} positions"
                )
            teacher = top_targets
        elif self.needs_teacher:
            if teacher_hidden is None or teacher_matrix is None:
                raise ValueError(
                    f"alpha is {self.alpha}: the distillation term needs the teacher's hidden states and matrix"
                )
            _check_shapes(teacher_hidden, teacher_matrix, targets)
            if teacher_matrix.shape[0] != student_matrix.shape[0]:
                raise ValueError(
                    f"the teacher's vocabulary has {teacher_matrix.shape[0]} entries, "
                    f"the student's {student_matrix.shape[0]}"
                )
            matrix = _Matrix.of(teacher_matrix.detach())
            memory = matrix.new_logits(len(targets))
            teacher = _Teacher(teacher_hidden.detach(), matrix, self.temperature, memory)
        apply: Callable[..., Any] = _TaskAndDistillation.apply
        total, distillation, task, num_correct = apply(
            student_hidden, student_matrix, targets, teacher, self, num_tokens
        )
        return LossParts(total, distillation / num_tokens, task / num_tokens, num_correct)

    def write_gradient(
        self, logits: Tensor, targets: Tensor, teacher: Tensor | TopTargets | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums (T²·D, CE, correct) over the rows, and the gradient of the weighted sum written over `logits`.

        `teacher`: its logits divided by the temperature, or what is known of its distribution.
        """
        student = _wide(logits)
        target_logits, best_logits = student.gather(1, targets[:, None]), student.amax(-1, keepdim=True)
        num_correct = (target_logits >= best_logits).sum()
        probs = student.softmax(-1)
        log_sum = _log_sum_exp(best_logits, probs)
        smoothing, num_classes = self.label_smoothing, logits.shape[1]
        task = log_sum.sum() - (1.0 - smoothing) * target_logits.sum()
        if smoothing:
            task = task - smoothing / num_classes * student.sum()
        distillation = task.new_zeros(())
        gradient = None
        if teacher is not None:
            distillation, gradient = self._distil(student, probs, log_sum, teacher)
        if self.beta:
            if smoothing:
                probs.sub_(smoothing / num_classes)
            index = targets[:, None]
            probs.scatter_(1, index, probs.gather(1, index).sub_(1.0 - smoothing))  # deterministic on CUDA as well
            gradient = probs.mul_(self.beta) if gradient is None else gradient.add_(probs, alpha=self.beta)
        logits.copy_(gradient) if gradient is not None else logits.zero_()
        return distillation, task, num_correct

    def write_gradient_in_one_kernel(
        self, logits: Tensor, targets: Tensor, teacher: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same on a CUDA device with Triton."""
        from cvm_translator.losses.one_kernel import write_gradient

        return write_gradient(
            logits,
            targets,
            teacher,
            divergence=self.divergence,
            temperature=self.temperature,
            alpha=self.alpha,
            beta=self.beta,
            smoothing=self.label_smoothing,
        )

    def _distil(
        self, student: Tensor, probs: Tensor, log_sum: Tensor, teacher: Tensor | TopTargets
    ) -> tuple[Tensor, Tensor]:
        """T² · D summed over the rows and alpha · T · its gradient, both at the temperature; D is the divergence."""
        if self.divergence == "forward_kl" and isinstance(teacher, Tensor):
            divergence, gradient = self._forward_kl(student, probs, log_sum, _wide(teacher))
        else:
            log_probs = (student / self.temperature).log_softmax(-1)
            known = teacher.spread(log_probs) if isinstance(teacher, TopTargets) else _wide(teacher).log_softmax(-1)
            divergence, gradient = DIVERGENCES[self.divergence](log_probs, known)
        return divergence * self.temperature**2, gradient.mul_(self.alpha * self.temperature)

    def _forward_kl(self, student: Tensor, probs: Tensor, log_sum: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """`divergences.forward_kl` with what the task term has computed already.

        KL = Σ p_teacher (z_teacher − z_student) − log Σ exp z_teacher + log Σ exp z_student, z the tempered logits.
        """
        if self.temperature == 1.0:
            tempered, tempered_probs = student, probs.clone() if self.beta else probs
        else:
            tempered = student / self.temperature
            tempered_probs = tempered.softmax(-1)
            log_sum = _log_sum_exp(tempered.amax(-1, keepdim=True), tempered_probs)
        teacher_probs = teacher.softmax(-1)
        teacher_log_sum = _log_sum_exp(teacher.amax(-1, keepdim=True), teacher_probs)
        mean_difference = torch.dot((teacher - tempered).flatten(), teacher_probs.flatten())
        divergence = mean_difference - (teacher_log_sum - log_sum).sum()
        return divergence, tempered_probs.sub_(teacher_probs)


def _log_sum_exp(best_logits: Tensor, probs: Tensor) -> Tensor:
    """log Σ exp z of each row, from its largest logit and its softmax: cheaper than another pass of exponentials."""
    return best_logits - probs.amax(-1, keepdim=True).log()


def _check_shapes(hidden: Tensor, matrix: Tensor, targets: Tensor) -> None:
    if (
        hidden.dim() != 2
        or matrix.dim() != 2
        or hidden.shape[1] != matrix.shape[1]
        or hidden.shape[:1] != targets.shape
    ):
        raise ValueError(
            f"hidden (N, D), matrix (V, D) and targets (N,) are needed, "
            f"got {tuple(hidden.shape)}, {tuple(matrix.shape)} and {tuple(targets.shape)}"
        )


class GradientBalance(NamedTuple):
    """How the two terms of the loss compare on one batch."""

    gradient_ratio: float
    """Norm of the weighted distillation gradient with respect to the logits, over that of the weighted task
    gradient."""
    effective_targets: float
    """exp of the mean entropy of the teacher's tempered distribution: among so many words it spreads its advice."""


@torch.no_grad()
def compute_gradient_ratio(
    loss: DistillationLoss,
    student_hidden: Tensor,
    student_matrix: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    teacher_matrix: Tensor,
) -> GradientBalance:
    """Compare the terms on one batch, shapes as in `DistillationLoss`; a ratio under about 0.2 means T is too high."""
    distillation = DistillationLoss(loss.temperature, loss.alpha, 0.0, divergence=loss.divergence)
    task = DistillationLoss(loss.temperature, 0.0, loss.beta, loss.label_smoothing)
    squares, entropy = [0.0, 0.0], 0.0
    for rows in _slices(len(targets), max(1, _BALANCE_ELEMENTS // student_matrix.shape[0])):
        logits = _wide(compute_logits(student_hidden[rows], student_matrix))
        teacher = _wide(compute_logits(teacher_hidden[rows] / loss.temperature, teacher_matrix))
        for term, (part, known) in enumerate(((distillation, teacher), (task, None))):
            gradient = logits.clone()
            part.write_gradient(gradient, targets[rows], known)
            squares[term] += gradient.double().square_().sum().item()
        log_probs = teacher.log_softmax(-1)
        entropy -= (log_probs.exp() * log_probs).sum().item()
    ratio = math.sqrt(squares[0] / squares[1]) if squares[1] else math.inf
    return GradientBalance(ratio, math.exp(entropy / len(targets)))
