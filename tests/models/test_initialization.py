"""First weights: reproducible, of sane size, or the teacher's."""

from __future__ import annotations

import pytest
import torch

from cvm_translator.config.schema import ModelConfig
from cvm_translator.errors import ConfigError
from cvm_translator.models.decoding import pad_sources
from cvm_translator.models.initialization import choose_layers, init_from_teacher, init_random
from cvm_translator.models.transformer import CvmTransformer


def make(encoder_layers: int, decoder_layers: int, **changes: int) -> CvmTransformer:
    sizes = {"dim": 32, "num_heads": 4, "feed_forward_dim": 64, **changes}
    return CvmTransformer(ModelConfig(encoder_layers=encoder_layers, decoder_layers=decoder_layers, **sizes), 50)


def test_random_weights_depend_on_the_seed_alone():
    first, second, other = make(2, 1), make(2, 1), make(2, 1)
    init_random(first, 1)
    before = torch.get_rng_state()
    init_random(second, 1)
    init_random(other, 2)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
        if name.endswith("weight") and "norm" not in name:
            assert not torch.equal(tensor, other.state_dict()[name])


def test_a_fresh_model_is_not_sure_of_much():
    # The tied matrix makes it favour the token just read; more than that would be a bad scale somewhere.
    model = CvmTransformer(ModelConfig(dim=128, num_heads=4, feed_forward_dim=256, encoder_layers=6), 2000).eval()
    init_random(model, 0)
    generator = torch.Generator().manual_seed(0)
    src = torch.randint(4, 2000, (8, 12), generator=generator)
    tgt = torch.randint(4, 2000, (8, 12), generator=generator)
    with torch.no_grad():
        hidden, matrix = model(src, torch.ones_like(src, dtype=torch.bool), tgt)
    loss = torch.nn.functional.cross_entropy((hidden @ matrix.T).flatten(0, 1), tgt.roll(-1, 1).flatten())
    assert loss.item() < torch.tensor(2000.0).log().item() + 2.0


@pytest.mark.parametrize(
    ("teacher", "student", "layers"),
    [(6, 3, [0, 2, 5]), (3, 1, [0]), (6, 6, [0, 1, 2, 3, 4, 5]), (12, 4, [0, 4, 7, 11]), (6, 2, [0, 5])],
)
def test_evenly_spaced_layers(teacher, student, layers):
    assert choose_layers(teacher, student) == layers


def test_copied_layers_are_the_chosen_ones():
    teacher, student = make(4, 3), make(2, 2)
    init_random(teacher, 0)
    init_from_teacher(student, teacher, encoder_layers_from=[3, 1])
    for ours, theirs in [
        (student.encoder_layers[0], teacher.encoder_layers[3]),
        (student.encoder_layers[1], teacher.encoder_layers[1]),
        (student.decoder_layers[0], teacher.decoder_layers[0]),
        (student.decoder_layers[1], teacher.decoder_layers[2]),
        (student.embedding, teacher.embedding),
        (student.decoder_norm, teacher.decoder_norm),
    ]:
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name])
    student.embedding.weight.data.zero_()
    assert teacher.embedding.weight.abs().sum() > 0  # a copy, not a view


def test_a_student_of_the_same_depth_is_the_teacher():
    teacher, student = make(2, 2), make(2, 2)
    init_random(teacher, 0)
    init_from_teacher(student, teacher)
    src, mask = pad_sources([[5, 6, 7], [8]], "cpu")
    tgt = torch.tensor([[2, 9], [2, 9]])
    with torch.no_grad():
        assert torch.equal(student.eval()(src, mask, tgt)[0], teacher.eval()(src, mask, tgt)[0])


@pytest.mark.parametrize(
    ("student", "message"),
    [
        (make(2, 1, dim=16), "dim is 16, the teacher's 32"),
        (make(2, 1, feed_forward_dim=32), "feed_forward_dim is 32, the teacher's 64"),
        (make(2, 1, num_heads=2), "num_heads is 2, the teacher's 4"),
        (
            CvmTransformer(ModelConfig(dim=32, num_heads=4, feed_forward_dim=64), 40),
            "vocabulary is 40, the teacher's 50",
        ),
    ],
)
def test_other_sizes_are_refused_by_name(student, message):
    with pytest.raises(ConfigError, match=message):
        init_from_teacher(student, make(4, 2))


def test_bad_layer_lists_are_refused():
    with pytest.raises(ConfigError, match="encoder_layers_from"):
        init_from_teacher(make(2, 1), make(4, 2), encoder_layers_from=[0])
    with pytest.raises(ConfigError, match="layer 9"):
        init_from_teacher(make(2, 1), make(4, 2), decoder_layers_from=[9])
