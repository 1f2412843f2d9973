"""Test sets that a user names for `validate`."""

from __future__ import annotations

from pathlib import Path

import pytest

from cvm_translator.errors import CorpusError
from cvm_translator.pipeline.scoring import read_pairs


def test_a_relative_path_may_lie_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.tsv").write_text("eins\tone\nzwei\ttwo")
    monkeypatch.chdir(tmp_path)
    assert [pair[:2] for pair in read_pairs(Path("data/test.tsv"))] == [("eins", "one"), ("zwei", "two")]


@pytest.mark.parametrize(
    ("content", "words"), [("eins\tone\nzwei\n", r"test.tsv:2: no_tab; mend the row"), ("", "holds no pairs")]
)
def test_no_row_is_left_out(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "test.tsv").write_text(content)
    with pytest.raises(CorpusError, match=words):
        read_pairs(tmp_path / "test.tsv")
