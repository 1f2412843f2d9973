"""The quick instance of benchmarks/reliability/fuzzed_corpus.py; and that its checks can fail."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from benchmarks.reliability import fuzzed_corpus


@pytest.mark.slow
def test_garbage_is_counted_and_kept_out(tmp_path: Path) -> None:
    options = fuzzed_corpus.build_parser().parse_args(["--lines", "6000", "--work", str(tmp_path / "work")])
    data = fuzzed_corpus.run_benchmark(options)
    assert not any(data["failures"].values())
    assert {"invalid_utf8", "nul_character", "not_json", "no_tab", "uneven_line_count"} <= set(
        data["many"]["filters"]["quarantine"]
    )
    assert "6,000 lines in three sources" in fuzzed_corpus.format_results(data)


def test_each_damage_changes_a_line() -> None:
    generator, line = random.Random(1), b"eine Zeile\ta line of text"
    for name, damage in fuzzed_corpus.DAMAGES.items():
        assert any(damage(generator, line) != line for _ in range(5)), name


def test_rows_that_do_not_add_up_are_found(tmp_path: Path) -> None:
    tally = {"num_read": 3, "dropped": {"identical": 1}, "quarantined": {"no_tab": 1}, "num_kept": 0}
    (tmp_path / "filters.json").write_text(json.dumps({"sources": [tally], "quarantine": {"no_tab": 2}}))
    (tmp_path / "quarantine.tsv").write_text("origin\treason\ttext\na:1\tno_tab\tx\n")
    assert len(fuzzed_corpus.find_uncounted(tmp_path, {"tsv": 3})) == 2
    for role in fuzzed_corpus.ROLES:
        (tmp_path / f"{role}.tsv").write_bytes(b"a\tb\tc\n" if role != "test" else b"a\t\tc\n\xff\tb\tc\n")
    assert len(fuzzed_corpus.find_unsound(tmp_path)) == 2
