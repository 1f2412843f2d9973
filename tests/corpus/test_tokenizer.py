"""The tokenizer: fixed ids, exact round trips, no way from text to control ids."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from cvm_translator.config.schema import CorpusConfig, TokenizerConfig
from cvm_translator.corpus.build import build_corpus
from cvm_translator.corpus.records import Pair
from cvm_translator.corpus.text import normalise_text
from cvm_translator.corpus.tokenizer import (
    BOS_ID,
    EOS_ID,
    MODEL_NAME,
    PAD_ID,
    UNK_ID,
    Tokenizer,
    build_tokenizer,
    train_sentencepiece,
)
from cvm_translator.errors import CorpusError

from .conftest import make_sentences, write_tsv

CONFIG = TokenizerConfig(vocab_size=340, character_coverage=1.0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer_corpus")
    sentences = make_sentences(300)
    marked = [(f"%(name)s: {source}", f"%(name)s: {target}") for source, target in sentences[:30]]
    write_tsv(folder / "train.tsv", [*marked, *sentences[30:]])
    config = CorpusConfig(train=[{"format": "tsv", "path": "train.tsv"}], validation_size=5, test_size=5)
    build_corpus(config, folder / "corpus", seed=1, base_dir=folder, report=lambda message: None)
    return folder / "corpus"


@pytest.fixture(scope="module")
def tokenizer(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return build_tokenizer(CONFIG, corpus, tmp_path_factory.mktemp("tokenizer"), lambda message: None)


def test_ids_are_those_of_the_design(tokenizer: Tokenizer) -> None:
    assert (BOS_ID, PAD_ID, EOS_ID, UNK_ID) == (0, 1, 2, 3)
    assert [tokenizer.id_to_piece(index) for index in range(4)] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert tokenizer.vocab_size == 340


def test_text_never_becomes_a_control_id(tokenizer: Tokenizer) -> None:
    texts = ["<s>", "</s>", "<pad>", "<unk>", "a <s> b </s>", "<0x41>", "日本 🎉"]
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert not {BOS_ID, PAD_ID, EOS_ID, UNK_ID} & set(ids), text
    assert tokenizer.decode(tokenizer.encode(texts)) == texts


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40).map(normalise_text).filter(lambda text: "\u2581" not in text))
def test_any_clean_text_survives(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode([text])
    assert all(index > UNK_ID for index in ids[0])
    assert tokenizer.decode(ids) == [text]


def test_placeholders_are_whole(tokenizer: Tokenizer) -> None:
    for name in ("%(name)s", "%s", "{0}", "{}"):
        text = f"Die Datei {name} fehlt ({name})."
        ids = tokenizer.encode([text])[0]
        assert [tokenizer.id_to_piece(index) for index in ids].count(name) == 2
        assert tokenizer.decode([ids]) == [text]


def test_decoding_drops_marks_and_survives_any_ids(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(["Die rote Datei"])[0]
    assert tokenizer.decode([[EOS_ID, *ids, EOS_ID, PAD_ID], []]) == ["Die rote Datei", ""]
    assert tokenizer.decode([]) == []
    assert all(isinstance(text, str) for text in tokenizer.decode([[index] for index in range(tokenizer.vocab_size)]))


def test_composed_and_decomposed_text_are_the_same(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode(["Tu\u0308r"]) == tokenizer.encode(["Tür"])


def test_deterministic_and_reused(corpus: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    messages: list[str] = []
    again = build_tokenizer(CONFIG, corpus, tmp_path, messages.append)
    assert again.sha256 == tokenizer.sha256
    assert again.path.read_bytes() == tokenizer.path.read_bytes()
    build_tokenizer(CONFIG, corpus, tmp_path, messages.append)
    assert "reused" in messages[-1]
    (tmp_path / MODEL_NAME).write_bytes(b"damaged")
    repaired = build_tokenizer(CONFIG, corpus, tmp_path, messages.append)
    assert repaired.sha256 == tokenizer.sha256 and any("damaged" in message for message in messages)
    other = build_tokenizer(CONFIG.model_copy(update={"vocab_size": 330}), corpus, tmp_path, messages.append)
    assert other.vocab_size == 330


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_too_large_a_vocabulary_names_the_largest(corpus: Path, tmp_path: Path, model_type: str) -> None:
    config = TokenizerConfig(vocab_size=20_000, character_coverage=1.0, model_type=model_type)
    with pytest.raises(CorpusError, match="vocab_size 20000 is more than this corpus allows") as caught:
        build_tokenizer(config, corpus, tmp_path, lambda message: None)
    largest = int(str(caught.value).split("set it to ")[1].split()[0])
    fitting = config.model_copy(update={"vocab_size": largest})
    assert build_tokenizer(fitting, corpus, tmp_path, lambda message: None).vocab_size == largest


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_too_small_a_vocabulary(model_type: str) -> None:
    pairs = [Pair(chr(0x4E00 + number) * 2, "word", "t:1") for number in range(200)]
    config = TokenizerConfig(vocab_size=300, character_coverage=1.0, model_type=model_type)
    with pytest.raises(CorpusError, match="vocab_size 300 is too small"):
        train_sentencepiece(pairs, config)


def test_a_given_model_is_taken_over(corpus: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = TokenizerConfig(path=tokenizer.path)
    taken = build_tokenizer(config, corpus, tmp_path, lambda message: None)
    assert taken.sha256 == tokenizer.sha256 and taken.path == tmp_path / MODEL_NAME
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["vocab_size"] == 340


def test_models_that_do_not_fit_are_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"nowhere\.model does not exist"):
        build_tokenizer(TokenizerConfig(path=tmp_path / "nowhere.model"), corpus, tmp_path, lambda message: None)
    (tmp_path / "text.model").write_text("no model at all")
    with pytest.raises(CorpusError, match=r"text\.model is no SentencePiece model"):
        Tokenizer.load(tmp_path / "text.model")
    (tmp_path / "empty.model").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"empty\.model is no SentencePiece model"):
        Tokenizer.load(tmp_path / "empty.model")
    stream = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text for pair in make_sentences(100) for text in pair),
        model_writer=stream,
        vocab_size=80,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "ids.model").write_bytes(stream.getvalue())
    with pytest.raises(CorpusError, match=r"has ids bos, pad, eos, unk = \(1, -1, 2, 0\), expected \(0, 1, 2, 3\)"):
        Tokenizer.load(tmp_path / "ids.model")
