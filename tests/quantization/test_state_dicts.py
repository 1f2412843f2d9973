"""What a quantised layer stores comes back from a safetensors file as it was, into a layer built without numbers."""

from __future__ import annotations

import tempfile
from pathlib import Path

import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvm_translator.quantization import LayerFormat, QuantizableLinear, TiedEmbedding
from cvm_translator.quantization.convert import DEPLOYED, deploy
from cvm_translator.quantization.deployed import DeployedLinear, Int8StaticLinear

formats = st.sampled_from([kind for kind in DEPLOYED if kind != "int4"]).map(LayerFormat) | st.builds(
    LayerFormat, st.just("int4"), st.none() | st.integers(1, 80).map(lambda half: 2 * half), st.booleans()
)


def reload(stored: DeployedLinear, empty: DeployedLinear) -> None:
    """Through a file, as a model folder is loaded."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.safetensors"
        safetensors.torch.save_file(stored.state_dict(), path)
        empty.load_state_dict(safetensors.torch.load_file(path), strict=True, assign=True)


def assert_equal_states(actual: DeployedLinear, expected: DeployedLinear) -> None:
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(ours[name], tensor)
    assert torch.equal(actual.dequantized_weight(), expected.dequantized_weight())
    assert str(actual) == str(expected)


@given(layer_format=formats, width=st.integers(1, 200), num_outputs=st.integers(1, 24), bias=st.booleans())
@settings(max_examples=150, deadline=None)
def test_linear_layers_round_trip_through_files(layer_format, width, num_outputs, bias):
    torch.manual_seed(width)
    stored = deploy("a", QuantizableLinear(width, num_outputs, bias=bias), layer_format)
    if isinstance(stored, Int8StaticLinear):
        stored.set_input_range(-1.5, 4.0)
    with torch.device("meta"):
        empty = deploy("a", QuantizableLinear(width, num_outputs, bias=bias), layer_format)
    reload(stored, empty)
    assert_equal_states(empty, stored)
    values = torch.randn(3, width)
    assert torch.equal(empty(values), stored(values))


@given(layer_format=formats, width=st.integers(1, 200), num_words=st.integers(1, 24))
@settings(max_examples=150, deadline=None)
def test_embeddings_round_trip_through_files(layer_format, width, num_words):
    torch.manual_seed(width)
    stored = deploy("a", TiedEmbedding(num_words, width), layer_format)
    if isinstance(stored, Int8StaticLinear):
        stored.set_input_range(-1.5, 4.0)
    with torch.device("meta"):
        empty = deploy("a", TiedEmbedding(num_words, width), layer_format)
    reload(stored, empty)
    assert_equal_states(empty, stored)
    ids, hidden = torch.arange(num_words), torch.randn(3, width)
    assert torch.equal(empty.embed(ids), stored.embed(ids))
    assert torch.equal(empty.project(hidden), stored.project(hidden))
