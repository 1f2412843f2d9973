"""Formats and plans as plain data, and what is none."""

from __future__ import annotations

import json

import pytest

from cvm_translator.quantization import LayerFormat, name_plan, parse_plan, plan_to_plain
from cvm_translator.quantization.formats import KINDS

FORMATS = [
    *(LayerFormat(kind) for kind in KINDS),
    LayerFormat("int4", 64),
    LayerFormat("int4", 2, symmetric=False),
    LayerFormat("int4", None, symmetric=False),
]


@pytest.mark.parametrize("layer_format", FORMATS, ids=str)
def test_round_trip_through_json(layer_format):
    plan = {"layers.0": layer_format}
    assert parse_plan(json.loads(json.dumps(plan_to_plain(plan)))) == plan
    assert parse_plan(plan) == plan


def test_bits():
    assert {kind: LayerFormat(kind).bits for kind in KINDS} == {
        "float32": 32,
        "float16": 16,
        "int8": 8,
        "int8_static": 8,
        "int8_weights": 8,
        "int4": 4,
    }


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("int8", "a number format is a mapping such as {kind: int8}, not 'int8'"),
        (None, "not None"),
        ({}, "needs a kind: float32, float16"),
        ({"kind": "int3"}, "kind 'int3' is no number format: known are float32, float16, int8"),
        ({"kind": ["int8"]}, r"kind \['int8'\] is no number format"),
        ({"kind": "int4", "group": 64}, "'group' is no part of a number format: known are kind, group_size, symmetric"),
        ({"kind": "int8", "group_size": 64}, "kind int8 has a step for each row: leave group_size and symmetric out"),
        ({"kind": "int8", "symmetric": False}, "leave group_size and symmetric out"),
        ({"kind": "int4", "group_size": 3}, "group_size 3 must be an even number from 2 up, or null for a whole row"),
        ({"kind": "int4", "group_size": 0}, "group_size 0"),
        ({"kind": "int4", "group_size": -2}, "group_size -2"),
        ({"kind": "int4", "group_size": True}, "group_size True"),
        ({"kind": "int4", "group_size": 64.0}, "group_size 64.0"),
        ({"kind": "int4", "group_size": "64"}, "group_size '64'"),
        ({"kind": "int4", "symmetric": 1}, "symmetric 1 must be true or false"),
    ],
)
def test_bad_formats_are_refused_with_the_layer(value, message):
    with pytest.raises(ValueError, match=f"^layer 'layers.0': .*{message}"):
        parse_plan({"layers.0": value})


@pytest.mark.parametrize("value", [None, [], "int8", {3: {"kind": "int8"}}])
def test_what_is_no_plan(value):
    with pytest.raises(ValueError, match="a plan maps each layer's name to its number format"):
        parse_plan(value)


def test_name_of_a_plan():
    int8, four, coarse = LayerFormat("int8"), LayerFormat("int4", 32), LayerFormat("int4", None)
    assert name_plan({"a": int8, "b": int8}) == "int8"
    assert name_plan({"a": four, "b": coarse}) == "int4"
    assert name_plan({"a": int8, "b": four}) == "mixed"
