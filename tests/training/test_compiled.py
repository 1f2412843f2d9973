"""Training through PyTorch's compiler and on a GPU: the same steps, and resumes that change no bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from cvm_translator.config.compilers import HAS_COMPILER, HAS_TRITON
from cvm_translator.config.schema import ModelConfig, TrainingConfig
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.errors import ConfigError
from cvm_translator.losses.distillation import DistillationLoss
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.training import device as devices
from cvm_translator.training.device import is_compiled
from cvm_translator.training.objectives import DistillationObjective
from cvm_translator.training.optimizer import build_optimizer
from cvm_translator.training.step import move_if_admitted

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = ModelConfig(
    dim=32, num_heads=2, feed_forward_dim=48, encoder_layers=1, decoder_layers=1, dropout=0.1, max_length=16
)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_when_steps_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "HAS_TRITON", True)
    monkeypatch.setattr(devices, "HAS_COMPILER", True)
    assert is_compiled("auto", 1000, CUDA) and not is_compiled("auto", 999, CUDA)
    assert not is_compiled("auto", 10_000, CPU) and is_compiled(True, 10, CPU) and not is_compiled(False, 10_000, CUDA)
    monkeypatch.setattr(devices, "HAS_TRITON", False)
    assert not is_compiled("auto", 1000, CUDA) and is_compiled(True, 10, CPU)
    with pytest.raises(ConfigError, match="compile: needs a C compiler, and on a GPU Triton"):
        is_compiled(True, 1000, CUDA)


@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
@pytest.mark.timeout(600)
def test_a_compiled_step_has_the_same_loss_and_gradient(
    make_model: Callable[..., CvmTransformer], teacher: CvmTransformer, dataset: DistillationDataset
) -> None:
    """Of a student that rounds to the int8 grid; without dropout, whose draws are others."""
    student = make_model(SIZES.model_copy(update={"dropout": 0.0}))
    student.set_fake_quantization(True)
    batch = dataset.batch([0, 7, 3, 21, 45])
    found = []
    for compiles in (False, True):
        objective = DistillationObjective(student, DistillationLoss(2.0, 0.7, 0.3), teacher)
        if compiles:
            objective.compile()
        student.zero_grad()
        parts = objective(batch, batch.num_tokens)
        parts.total.backward()
        gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
        found.append((parts.total.detach(), gradients))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [0.5, 8.0])
def test_a_masked_step_is_a_clipped_one(norm: float) -> None:
    """`move_if_admitted` against clipping and stepping by hand, from the same gradients."""
    settings = TrainingConfig(num_iterations=10, warmup_steps=0, max_grad_norm=2.0)
    moved = []
    for is_masked in (False, True):
        torch.manual_seed(1)
        model = torch.nn.Linear(5, 3)
        optimizer = build_optimizer(model, settings)
        for _ in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            torch._foreach_mul_(gradients, norm / torch.nn.utils.get_total_norm(gradients))
            if is_masked:
                move_if_admitted(optimizer, torch.tensor(True), torch.tensor(norm), settings.max_grad_norm)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
                optimizer.step()
        moved.append([parameter.detach() for parameter in model.parameters()])
    torch.testing.assert_close(moved[0], moved[1])


def test_a_refused_step_leaves_weights_moments_and_count() -> None:
    model = torch.nn.Linear(5, 3)
    optimizer = build_optimizer(model, TrainingConfig(num_iterations=10, warmup_steps=0))
    for is_admitted in (True, False):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 if is_admitted else torch.nan)
        before = [parameter.clone() for parameter in model.parameters()]
        move_if_admitted(optimizer, torch.tensor(is_admitted), torch.tensor(1.0 if is_admitted else torch.nan), 1.0)
        for old, parameter in zip(before, model.parameters(), strict=True):
            assert torch.equal(old, parameter) != is_admitted
            assert optimizer.state[parameter]["step"] == 1 and optimizer.state[parameter]["exp_avg"].isfinite().all()
    assert not hasattr(optimizer, "found_inf")


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@needs_cuda
@pytest.mark.timeout(600)
@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.skipif(not HAS_TRITON, reason=""))])
@pytest.mark.usefixtures("deterministic")
def test_a_resume_on_a_gpu_changes_no_bit(compiles: bool, bench: Any) -> None:
    """Also through batches that are not admitted, and a rollback."""
    bench.device, bench.sizes = CUDA, SIZES
    options: dict[str, Any] = {
        "is_compiled": compiles,
        "precision": "bfloat16",
        "script": {(1, 10): "degraded"},
        "faults": [{"kind": "nan_loss", "from_step": 7, "num_steps": 2}],
    }
    whole = bench.run(folder="whole", **options)
    loop = bench.build(**options)
    step = loop._step

    def stop_at_the_thirteenth() -> Any:
        if loop.state.executed_steps == 13:
            raise KeyboardInterrupt
        return step()

    loop._step = stop_at_the_thirteenth
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    resumed = bench.run(**options)
    assert whole.state.num_skipped == 2 and len(whole.state.rollbacks) == 1
    assert resumed.state == whole.state
    ours, theirs = bench.weights(resumed), bench.weights(whole, "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
