"""The quick instance of benchmarks/reliability/starts.py: a few starts at once on one run folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks.reliability import starts


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_of_eight_wins(tmp_path: Path) -> None:
    options = starts.build_parser().parse_args(["--starts", "8", "--work", str(tmp_path / "work")])
    data = starts.run_benchmark(options)
    assert data["failures"][starts.ONE] == []
    assert data["failures"][starts.TOLD] == []
    assert data["failures"][starts.STALE] == []
    assert data["num_winners"] == 1
    assert "8 starts at once" in starts.format_results(data)


@pytest.mark.parametrize(
    ("line", "is_clear"),
    [
        ("error: /r is in use by process 12 on h: it runs already; stop it with cvm-translator stop /r, or", True),
        ("error: /r is in use by process unknown on h since now: stop it with cvm-translator stop /r, or", True),
        ("error: the run ended with exit code 1 before it began", False),
    ],
)
def test_what_a_clear_message_is(line: str, is_clear: bool) -> None:
    assert bool(starts.MESSAGE.fullmatch(line)) is is_clear


def test_imports_of_torch_are_counted() -> None:
    lines = [
        "import time:  1 |  2 |   torch.nn",
        "import time:  1 |  2 | torch",
        "import time: 3 | 4 |     torch",
        "import torch",
    ]
    assert len(re.findall(starts.IMPORTED_TORCH, "\n".join(lines))) == 2
