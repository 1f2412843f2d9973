"""The teacher's stored states against the teacher itself: order, loss, accumulation, identity of the file."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cvm_translator.config.schema import ModelConfig
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.errors import Stopped
from cvm_translator.losses import find_top_targets
from cvm_translator.losses.distillation import DistillationLoss
from cvm_translator.models.initialization import init_random
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.teachers import rows
from cvm_translator.teachers.states import StoredTeacher, TeacherStates, TeacherTopTargets
from cvm_translator.training.objectives import DistillationObjective, find_real_targets

VOCAB = 40
INDICES = np.array([150, 3, 77, 8, 9, 160, 21, 0, 55])


def make_model(dim: int, seed: int) -> CvmTransformer:
    config = ModelConfig(
        dim=dim, num_heads=2, feed_forward_dim=48, encoder_layers=1, decoder_layers=1, dropout=0.0, max_length=32
    )
    model = CvmTransformer(config, VOCAB)
    init_random(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)  # far from uniform, so that an error in the states would show in the loss
    return model.eval()


@pytest.fixture(scope="module")
def teacher() -> CvmTransformer:
    torch.set_num_threads(1)
    return make_model(32, 1)


@pytest.fixture(scope="module")
def dataset() -> DistillationDataset:
    generator = np.random.default_rng(0)

    def draw() -> list[int]:
        return generator.integers(4, VOCAB, generator.integers(1, 20)).tolist()

    return DistillationDataset([draw() for _ in range(170)], [draw() for _ in range(170)])


BFLOAT16 = partial(torch.autocast, "cpu", dtype=torch.bfloat16)


def fill(
    stored: StoredTeacher,
    teacher: CvmTransformer,
    should_stop: Callable[[], None] = lambda: None,
    autocast: Callable[[], Any] = BFLOAT16,
) -> bool:
    """Whether it was there already."""
    was_there = stored.file.is_intact()
    if not was_there:
        stored.make(teacher, autocast, should_stop)
    return was_there


@pytest.fixture(scope="module")
def states(
    teacher: CvmTransformer, dataset: DistillationDataset, tmp_path_factory: pytest.TempPathFactory
) -> TeacherStates:
    stored = TeacherStates(tmp_path_factory.mktemp("states"), teacher, "ab" * 32, dataset)
    fill(stored, teacher)
    return stored


def test_states_are_the_teachers_in_the_order_of_the_flattened_batch(
    teacher: CvmTransformer, dataset: DistillationDataset, states: TeacherStates
) -> None:
    batch = dataset.batch(INDICES)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, _ = teacher(batch.src, batch.src_mask, batch.tgt_in)
    expected = hidden.flatten(0, 1)[find_real_targets(batch)]
    found = states.gather(INDICES)
    assert (found.dtype, found.shape) == (torch.bfloat16, expected.shape)
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.03)
    for row, index in enumerate(INDICES):  # a single pair, wherever it stands, has its own states
        length = int(dataset.lengths[index, 1]) + 1
        alone = states.gather(np.array([index]))
        begin = sum(int(dataset.lengths[other, 1]) + 1 for other in INDICES[:row])
        assert torch.equal(alone, found[begin : begin + length])


@pytest.mark.parametrize("parts", [1, 4])
def test_the_loss_and_its_gradient_are_those_of_the_online_teacher(
    parts: int, teacher: CvmTransformer, dataset: DistillationDataset, states: TeacherStates
) -> None:
    """Whole and under accumulation, within what bfloat16 rounds away."""
    batch = dataset.batch(INDICES)
    losses, gradients = [], []
    for stored in (None, states):
        student = make_model(16, 2)
        objective = DistillationObjective(student, DistillationLoss(1.5, 1.0, 0.0), teacher, stored)
        total = 0.0
        for piece in batch.split(parts):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = objective(piece, batch.num_tokens).total
            loss.backward()
            total += loss.item()
        losses.append(total)
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    assert losses[0] > 0.1
    assert losses[1] == pytest.approx(losses[0], rel=5e-3)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999


def test_states_that_the_batch_brings_are_those_that_would_be_read(
    teacher: CvmTransformer, dataset: DistillationDataset, states: TeacherStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, student = dataset.batch(INDICES), make_model(16, 2)
    objective = DistillationObjective(student, DistillationLoss(1.5, 1.0, 0.0), teacher, states)
    bringing = dataclasses.replace(batch, stored=states.read(INDICES))
    with torch.no_grad(), BFLOAT16():
        read = [objective(part, batch.num_tokens).total.item() for part in batch.split(3)]
        monkeypatch.setattr(states.file, "gather", None)  # nothing is read any more
        assert [objective(part, batch.num_tokens).total.item() for part in bringing.split(3)] == read


def test_the_wrong_pairs_states_would_show(
    teacher: CvmTransformer, dataset: DistillationDataset, states: TeacherStates
) -> None:
    """The tolerance above is far below what a mix-up of two pairs does."""
    batch = dataset.batch(INDICES)
    student = make_model(16, 2)
    loss = DistillationLoss(1.5, 1.0, 0.0)
    real = find_real_targets(batch)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        right = DistillationObjective(student, loss, teacher, states)(batch, batch.num_tokens).total.item()
        hidden, own = student(batch.src, batch.src_mask, batch.tgt_in)
        wrong = loss(
            hidden.flatten(0, 1)[real], own, batch.tgt_out.flatten()[real], num_tokens=batch.num_tokens,
            teacher_hidden=states.gather(INDICES).roll(1, 0), teacher_matrix=teacher.embedding.matrix(),
        ).total.item()  # fmt: skip
    assert abs(wrong - right) > 0.05 * right


def test_a_file_is_reused_only_for_the_same_teacher_and_pairs(
    teacher: CvmTransformer, dataset: DistillationDataset, tmp_path: Path
) -> None:
    def fill_again(sha256: str, pairs: DistillationDataset) -> bool:
        return fill(TeacherStates(tmp_path, teacher, sha256, pairs), teacher)

    assert not fill_again("a" * 64, dataset)
    path = TeacherStates(tmp_path, teacher, "a" * 64, dataset).file.path
    assert {file.name for file in tmp_path.iterdir()} == {path.name, f"{path.name}.json"}
    num_tokens = int((dataset.lengths[:, 1] + 1).sum())
    assert path.stat().st_size == num_tokens * teacher.config.dim * 2
    written = path.read_bytes()
    assert fill_again("a" * 64, dataset)
    other_pairs = DistillationDataset([dataset[i][0] for i in range(169)], [dataset[i][1] for i in range(169)])  # type: ignore[misc]
    assert not fill_again("a" * 64, other_pairs)
    assert not fill_again("b" * 64, dataset)
    damaged = bytearray(written)
    damaged[100] ^= 1
    for content in (written[:-2], bytes(damaged)):  # torn, and with one flipped bit
        path.write_bytes(content)
        assert not fill_again("a" * 64, dataset)
        assert path.read_bytes() == written


@pytest.mark.parametrize("save_every", [2, 1000])
def test_a_computation_that_was_stopped_goes_on_where_it_was(
    save_every: int,
    teacher: CvmTransformer,
    dataset: DistillationDataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(rows._BATCH_SIZES, "cpu", 10)
    monkeypatch.setattr(rows, "SAVE_EVERY_BATCHES", save_every)
    whole = TeacherStates(tmp_path / "whole", teacher, "a" * 64, dataset)
    fill(whole, teacher)
    stored = TeacherStates(tmp_path / "stopped", teacher, "a" * 64, dataset)
    calls: list[None] = []

    def stop_at_the_sixth() -> None:
        calls.append(None)
        if len(calls) == 6:
            raise Stopped(15)

    with pytest.raises(Stopped):
        fill(stored, teacher, stop_at_the_sixth)
    assert not stored.file.exists()
    assert not fill(stored, teacher, lambda: calls.append(None))
    assert len(calls) == 6 + 17 - 5  # five of seventeen batches were there
    assert stored.file.path.read_bytes() == whole.file.path.read_bytes()
    assert len(list(stored.file.path.parent.iterdir())) == 2


def test_progress_without_its_file_counts_nothing(
    teacher: CvmTransformer, dataset: DistillationDataset, tmp_path: Path
) -> None:
    stored = TeacherStates(tmp_path, teacher, "a" * 64, dataset)
    stored.file.path.with_name(stored.file.path.name + ".progress.json").write_text('{"num_batches": 2}')
    fill(stored, teacher)
    expected = TeacherStates(tmp_path / "other", teacher, "a" * 64, dataset)
    fill(expected, teacher)
    assert stored.file.path.read_bytes() == expected.file.path.read_bytes()


def test_progress_of_an_older_file_is_not_taken_for_that_of_a_new_one(
    teacher: CvmTransformer, dataset: DistillationDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the first save: the new file is as long as a whole one, and nothing is in it."""
    stored = TeacherStates(tmp_path, teacher, "a" * 64, dataset)
    stored.file.path.with_name(stored.file.path.name + ".progress.json").write_text('{"num_batches": 2}')
    with monkeypatch.context() as killed, pytest.raises(Stopped):
        killed.setattr(rows, "_save_progress", lambda *_: None)
        fill(stored, teacher, stop_here)
    fill(stored, teacher)
    expected = TeacherStates(tmp_path / "other", teacher, "a" * 64, dataset)
    fill(expected, teacher)
    assert stored.file.path.read_bytes() == expected.file.path.read_bytes()


def stop_here() -> None:
    raise Stopped(15)


def test_a_teacher_of_other_sizes_has_another_file(dataset: DistillationDataset, tmp_path: Path) -> None:
    """The same weights with other heads, or with slots, say something else."""
    plain = make_model(32, 1)
    names = {TeacherStates(tmp_path, plain, "a" * 64, dataset).file.path.name}
    for change in ({"num_heads": 4}, {"core_capacity": 4}):
        other = make_model(32, 1)
        other.config = other.config.model_copy(update=change)
        names.add(TeacherStates(tmp_path, other, "a" * 64, dataset).file.path.name)
    assert len(names) == 3


CONTENDER = """
import sys, time
from pathlib import Path
import numpy as np, torch
from cvm_translator.config.schema import ModelConfig
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.models.initialization import init_random
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.teachers import rows
from cvm_translator.teachers.states import TeacherStates

torch.set_num_threads(1)
rows._BATCH_SIZES["cpu"] = 4
teacher = CvmTransformer(
    ModelConfig(dim=8, num_heads=2, feed_forward_dim=8, encoder_layers=1, decoder_layers=1, max_length=32), 40
)
init_random(teacher, 1)
generator = np.random.default_rng(0)
sources = [generator.integers(4, 40, generator.integers(1, 20)).tolist() for _ in range(100)]
dataset = DistillationDataset(sources, sources)
computed = []
compute = rows.RowFile._compute
rows.RowFile._compute = lambda self, *given: (time.sleep(0.02), computed.append(1), compute(self, *given))
stored = TeacherStates(Path(sys.argv[1]), teacher, "a" * 64, dataset)
print("ready", flush=True)
sys.stdin.readline()
stored.make(teacher, lambda: torch.autocast("cpu", dtype=torch.bfloat16), lambda: None)
print(len(computed), stored.file.is_intact(), flush=True)
"""


def test_two_runs_that_want_the_same_file_compute_it_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CONTENDER, str(tmp_path)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=60)[0].split() for process in processes]
    assert sorted(answers) == [["0", "True"], ["25", "True"]]
    assert len(list(tmp_path.iterdir())) == 2


def test_top_targets_are_those_of_the_online_teacher(
    teacher: CvmTransformer, dataset: DistillationDataset, tmp_path: Path
) -> None:
    stored = TeacherTopTargets(tmp_path, teacher, "a" * 64, dataset, k=5, temperature=2.0, precision="bfloat16")
    assert not fill(stored, teacher)
    assert stored.file.num_bytes == int((dataset.lengths[:, 1] + 1).sum()) * 5 * 4
    batch = dataset.batch(INDICES)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden, matrix = teacher(batch.src, batch.src_mask, batch.tgt_in)
        logits = hidden.flatten(0, 1)[find_real_targets(batch)] @ matrix.to(torch.bfloat16).T
    expected, found = find_top_targets(logits, 2.0, 5), stored.gather(INDICES)
    assert (found.indices == expected.indices).float().mean() > 0.9  # bfloat16 has ties
    torch.testing.assert_close(found.log_probs.float(), expected.log_probs, rtol=0.02, atol=0.03)
    kept = float(stored.describe().split("targets, ")[1].split("%")[0]) / 100
    assert kept == pytest.approx(expected.log_probs.exp().sum(-1).mean().item(), abs=0.1)


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 5e-3), ("float32", 5e-4)])
def test_all_top_targets_give_the_loss_of_the_online_teacher(
    precision: str, tolerance: float, teacher: CvmTransformer, dataset: DistillationDataset, tmp_path: Path
) -> None:
    stored = TeacherTopTargets(tmp_path, teacher, "a" * 64, dataset, k=VOCAB, temperature=1.5, precision=precision)
    autocast = partial(BFLOAT16, enabled=precision == "bfloat16")
    fill(stored, teacher, autocast=autocast)
    batch, student, loss = dataset.batch(INDICES), make_model(16, 2), DistillationLoss(1.5, 1.0, 0.0)
    with torch.no_grad(), autocast():
        online, read = (
            DistillationObjective(student, loss, teacher, given)(batch, batch.num_tokens).total.item()
            for given in (None, stored)
        )
    assert read == pytest.approx(online, rel=tolerance)
