"""How a layer's numbers are stored and computed with (`LayerFormat`), and a *plan*: one format for each layer's name.

A plan names every linear layer of a model and its tied embedding, so that it can be read, edited and used again; as
plain data it is `{"encoder_layers.0.attention.qkv": {"kind": "int4", "group_size": 64, "symmetric": True}, …}`. What is
no plan is refused with the layer, the value and what is known; whether it fits a model is `check_plan`'s business.

Biases, norms and positions are float32 in every format.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

KINDS: Final[dict[str, int]] = {
    "float32": 32,  # as trained
    "float16": 16,  # weights in half precision, float activations
    "int8": 8,  # a step for each row; activations quantised per token as they come
    "int8_static": 8,  # the same weights; activations on one grid for each layer, from calibration
    "int8_weights": 8,  # the same weights, float activations
    "int4": 4,  # a step for each group of weights in a row, float activations
}
"""Every kind of format and its bits a weight."""


@dataclass(frozen=True)
class LayerFormat:
    """The number format of one layer; ValueError where the fields do not belong together."""

    kind: str = "float32"
    group_size: int | None = None
    """int4 only: weights that share a step, an even number from 2 up (a row's last group may be shorter); None: a whole
    row."""
    symmetric: bool = True
    """int4 only: integers −7…7 around zero; else 0…15 with a zero point for each group."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is no number format: known are {', '.join(KINDS)}")
        if not isinstance(self.symmetric, bool):
            raise ValueError(f"symmetric {self.symmetric!r} must be true or false")
        if self.kind != "int4":
            if self.group_size is not None or not self.symmetric:
                raise ValueError(f"kind {self.kind} has a step for each row: leave group_size and symmetric out")
            return
        if self.group_size is None:
            return
        is_number = isinstance(self.group_size, int) and not isinstance(self.group_size, bool)
        if not is_number or self.group_size < 2 or self.group_size % 2:
            raise ValueError(
                f"group_size {self.group_size!r} must be an even number from 2 up, or null for a whole row"
            )

    @property
    def bits(self) -> int:
        return KINDS[self.kind]

    def to_plain(self) -> dict[str, Any]:
        """JSON-compatible data that `parse` reads."""
        if self.kind != "int4":
            return {"kind": self.kind}
        return {"kind": self.kind, "group_size": self.group_size, "symmetric": self.symmetric}

    @classmethod
    def parse(cls, value: object) -> LayerFormat:
        """Read what `to_plain` wrote; ValueError names what is wrong with it."""
        if not isinstance(value, Mapping):
            raise ValueError(f"a number format is a mapping such as {{kind: int8}}, not {_shorten(value)}")
        unknown = [key for key in value if key not in ("kind", "group_size", "symmetric")]
        if unknown:
            raise ValueError(
                f"{_shorten(unknown[0])} is no part of a number format: known are kind, group_size, symmetric"
            )
        if "kind" not in value:
            raise ValueError(f"a number format needs a kind: {', '.join(KINDS)}")
        if not isinstance(value["kind"], str):
            raise ValueError(f"kind {_shorten(value['kind'])} is no number format: known are {', '.join(KINDS)}")
        return cls(value["kind"], value.get("group_size"), value.get("symmetric", True))

    def __str__(self) -> str:
        if self.kind != "int4":
            return self.kind
        group = "a whole row" if self.group_size is None else str(self.group_size)
        return f"int4 in groups of {group}" + ("" if self.symmetric else ", asymmetric")


Plan = dict[str, LayerFormat]
"""The format of each layer, by the layer's name in the model."""

FLOAT32 = LayerFormat("float32")
FLOAT16 = LayerFormat("float16")
INT8 = LayerFormat("int8")


def parse_plan(value: object) -> Plan:
    """Read a plan from plain data, or check one that is parsed already; ValueError names the layer."""
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"a plan maps each layer's name to its number format, it is not {_shorten(value)}")
    plan: Plan = {}
    for name, entry in value.items():
        with errors_of(_shorten(name)):
            plan[name] = entry if isinstance(entry, LayerFormat) else LayerFormat.parse(entry)
    return plan


def plan_to_plain(plan: Mapping[str, LayerFormat]) -> dict[str, dict[str, Any]]:
    """The plan as JSON-compatible data."""
    return {name: layer_format.to_plain() for name, layer_format in plan.items()}


def name_plan(plan: Mapping[str, LayerFormat]) -> str:
    """The kind that all layers share, or `mixed`."""
    kinds = {layer_format.kind for layer_format in plan.values()}
    return kinds.pop() if len(kinds) == 1 else "mixed" if kinds else "float32"


@contextlib.contextmanager
def errors_of(layer: str) -> Iterator[None]:
    """Every ValueError within names the layer."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {layer}: {error}") from error


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
