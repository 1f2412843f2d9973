"""Placeholders of every kind, and nothing else."""

from __future__ import annotations

import pytest

from cvm_translator.metrics.placeholders import find_placeholders


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("%(name)s and %(n)d", ["%(name)s", "%(n)d"]),
        ("%s, %d, %.2f, %5.1f%%", ["%s", "%d", "%.2f", "%5.1f"]),
        ("%1$s %2$d", ["%1$s", "%2$d"]),
        ("Open %1 in %2", ["%1", "%2"]),
        ("{} {0} {name} {x:.2f} {y!r}", ["{}", "{0}", "{name}", "{x:.2f}", "{y!r}"]),
        ("${name} {{ user.name }} {$ ctrl.path $}", ["${name}", "{{ user.name }}", "{$ ctrl.path $}"]),
        ("100% sure, 50 %ige Lösung, 100%", []),
        ("%s%s", ["%s", "%s"]),
    ],
)
def test_placeholders_in_their_order(text: str, expected: list[str]) -> None:
    assert find_placeholders(text) == expected


@pytest.mark.parametrize("unit", ["{{ ", "%(", "{", "a.", "$", "%1", "${a", "{$ "])
def test_hostile_repetitions_end(unit: str) -> None:
    """Anything quadratic would run into the test's time limit."""
    assert find_placeholders(unit * (300_000 // len(unit))) is not None
