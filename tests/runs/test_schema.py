"""The schema of the events: complete, of the version that is written, and strict enough to find a missing field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from cvm_translator.runs.events import KINDS, SCHEMA_VERSION, EventWriter
from cvm_translator.runs.schema import load_event_schema

SCHEMA = load_event_schema()


def problems(event: dict[str, Any]) -> list[str]:
    return [error.message for error in Draft202012Validator(SCHEMA).iter_errors(event)]


def kinds_described(schema: dict[str, Any]) -> set[str]:
    """The kinds that have a branch of their own which asks for fields."""
    branches = {branch["if"]["properties"]["kind"]["const"]: branch["then"]["$ref"] for branch in schema["allOf"]}
    return {kind for kind, ref in branches.items() if schema["$defs"].get(ref.split("/")[-1], {}).get("required")}


def test_it_is_a_schema_of_the_version_that_is_written() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema_version"] == {"const": SCHEMA_VERSION}


def test_every_kind_that_is_written_is_described() -> None:
    assert set(KINDS) - kinds_described(SCHEMA) == set()
    assert set(SCHEMA["properties"]["kind"]["enum"]) == kinds_described(SCHEMA)


def test_a_kind_without_a_description_is_found() -> None:
    for kind in KINDS:
        schema = json.loads(json.dumps(SCHEMA))
        del schema["$defs"][kind]["required"]
        assert kind not in kinds_described(schema)


@pytest.mark.parametrize("kind", sorted(kinds_described(SCHEMA)))
def test_each_field_that_a_kind_needs_is_asked_for(kind: str) -> None:
    event = {"schema_version": SCHEMA_VERSION, "time": "2026-03-01T08:00:00.000+00:00", "kind": kind, "step": None}
    event |= {"attempt": 1}
    missing = [text for text in problems(event) if text.endswith("is a required property")]
    assert len(missing) == len(SCHEMA["$defs"][kind]["required"])


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"schema_version": 2}, "1 was expected"),
        ({"kind": "trian"}, "is not one of"),
        ({"time": "yesterday"}, "does not match"),
        ({"attempt": 0}, "minimum"),
        ({"message": 3}, "is not of type"),
    ],
)
def test_what_is_wrong_is_found(tmp_path: Path, change: dict[str, Any], part: str) -> None:
    with EventWriter(tmp_path / "events.jsonl") as events:
        events.write("warning", code="x", message="y")
    event = json.loads((tmp_path / "events.jsonl").read_bytes())
    assert problems(event) == []
    assert any(part in text for text in problems(event | change))


def test_numbers_that_json_has_not_are_allowed_as_text(tmp_path: Path) -> None:
    fields: dict[str, Any] = dict.fromkeys(SCHEMA["$defs"]["train"]["required"], float("nan"))
    fields |= {"stage": "distil", "executed_step": 1, "num_tokens": 3, "skipped": True}
    with EventWriter(tmp_path / "events.jsonl") as events:
        events.write("train", step=1, **fields)
    assert problems(json.loads((tmp_path / "events.jsonl").read_bytes())) == []
