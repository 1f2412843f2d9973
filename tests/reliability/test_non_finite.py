"""The quick instance of benchmarks/reliability/non_finite.py; and that its checks can fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.reliability import non_finite
from cvm_translator.training import step as step_module


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    numbers = {"--num-spoilt": "15", "--num-steps": "120", "--num-rows": "3", "--work": str(tmp_path / "work")}
    return [part for pair in numbers.items() for part in pair]


def test_nothing_that_is_not_finite_reaches_the_weights(options: list[str]) -> None:
    data = non_finite.run_benchmark(non_finite.build_parser().parse_args(options))
    assert not any(data["failures"].values())
    assert set(data["caught"]) == set(non_finite.KINDS)
    assert "three in a row in 3 further loops" in non_finite.format_results(data)


def test_a_step_that_looks_at_the_loss_alone_is_found_out(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are not finite then reach the weights."""
    measure = step_module.nn.utils.get_total_norm

    def measure_blindly(*arguments: object) -> object:
        norm = measure(*arguments)  # type: ignore[arg-type]
        return norm.nan_to_num(1.0, 1.0, 1.0)

    monkeypatch.setattr(step_module.nn.utils, "get_total_norm", measure_blindly)
    data = non_finite.run_benchmark(non_finite.build_parser().parse_args([*options, "--num-rows", "0"]))
    assert data["failures"][non_finite.CAUGHT]
