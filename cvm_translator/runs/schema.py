"""What each kind of event holds, as a JSON Schema (draft 2020-12): `events.schema.json` in this package.

For whoever reads `logs/events.jsonl` with tools of their own. Its version is `SCHEMA_VERSION`, which every event
carries; tests hold the events of real runs against it.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any


def load_event_schema() -> dict[str, Any]:
    """The schema of one event as plain data."""
    schema: dict[str, Any] = json.loads(files(__package__).joinpath("events.schema.json").read_text(encoding="utf-8"))
    return schema
