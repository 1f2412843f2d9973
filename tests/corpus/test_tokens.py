"""Token files: the same ids as in memory, reused when whole, made again when not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cvm_translator.config.schema import CorpusConfig, TokenizerConfig
from cvm_translator.corpus import tokens
from cvm_translator.corpus.build import build_corpus, load_split
from cvm_translator.corpus.dataset import DistillationDataset
from cvm_translator.corpus.split_file import SplitFile
from cvm_translator.corpus.tokenizer import Tokenizer, build_tokenizer
from cvm_translator.corpus.tokens import obtain_tokens

from .conftest import make_sentences, write_tsv


@pytest.fixture
def text(tmp_path: Path) -> tuple[SplitFile, Tokenizer]:
    write_tsv(tmp_path / "train.tsv", make_sentences(400))
    config = CorpusConfig(train=[{"format": "tsv", "path": "train.tsv"}], validation_size=20, test_size=20)  # type: ignore[list-item]
    build_corpus(config, tmp_path / "corpus", seed=1, base_dir=tmp_path, report=print)
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=340), tmp_path / "corpus", tmp_path / "tokenizer", print)
    return load_split(tmp_path / "corpus", "train"), tokenizer


def test_files_hold_what_the_tokenizer_gives(
    text: tuple[SplitFile, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split, tokenizer = text
    in_memory = DistillationDataset.from_pairs(split, tokenizer, max_length=20)
    monkeypatch.setattr(tokens, "CHUNK_PAIRS", 100)
    data = DistillationDataset.from_files(obtain_tokens(split, tokenizer, tmp_path / "tokens"), max_length=20)
    assert data.num_dropped == in_memory.num_dropped > 0 and len(data) > 100
    assert np.array_equal(data.kept, in_memory.kept) and np.array_equal(data.lengths, in_memory.lengths)
    for index in range(len(data)):
        for side, expected in zip(data[index], in_memory[index], strict=True):
            assert side.tolist() == expected.tolist()
    assert (tmp_path / "tokens" / "source.ids").stat().st_size == 2 * int(
        sum(len(ids) for ids in tokenizer.encode([pair.source for pair in split]))
    )


def test_whole_files_are_reused_and_the_hash_tells_what_is_kept(
    text: tuple[SplitFile, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = obtain_tokens(*text, tmp_path / "tokens")
    monkeypatch.setattr(tokens, "_write", lambda *_: pytest.fail("made again"))
    again = obtain_tokens(*text, tmp_path / "tokens")
    assert again.sha256 == first.sha256
    hashes = {DistillationDataset.from_files(again, length).sha256 for length in (None, 20, 16, None)}
    assert len(hashes) == 3


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "target.ids").write_bytes((folder / "target.ids").read_bytes()[:-2]),
        lambda folder: (folder / "source.lengths").unlink(),
        lambda folder: (folder / "manifest.json").write_text('{"inputs": 3}'),
        lambda folder: (folder / "manifest.json").write_text("[]"),
    ],
)
def test_damaged_files_are_made_again(
    text: tuple[SplitFile, Tokenizer], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    first = obtain_tokens(*text, tmp_path / "tokens")
    damage(tmp_path / "tokens")
    assert obtain_tokens(*text, tmp_path / "tokens").sha256 == first.sha256


def test_other_text_is_made_anew(text: tuple[SplitFile, Tokenizer], tmp_path: Path) -> None:
    split, tokenizer = text
    first = obtain_tokens(split, tokenizer, tmp_path / "tokens")
    other = load_split(tmp_path / "corpus", "test")
    second = obtain_tokens(other, tokenizer, tmp_path / "tokens")
    assert second.sha256 != first.sha256 and len(second.source.lengths) == len(other) == 20


def test_a_split_is_read_pair_by_pair(text: tuple[SplitFile, Tokenizer]) -> None:
    split, _ = text
    pairs = list(split)
    assert len(split) == len(pairs) == 360
    assert split[0] == pairs[0] and split[-1] == pairs[-1] and split[3:9:2] == pairs[3:9:2]
    with pytest.raises(IndexError):
        split[360]


def test_an_empty_split_is_none(tmp_path: Path) -> None:
    (tmp_path / "empty.tsv").write_bytes(b"")
    split = SplitFile(tmp_path / "empty.tsv", 0, "")
    assert list(split) == [] and split[:5] == []
