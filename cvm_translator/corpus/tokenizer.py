"""One SentencePiece vocabulary for both languages, trained on the training split or loaded.

Guarantees: ids are bos 0, pad 1, eos 2, unk 3 (the layout under which CTranslate2 and Transformers agree); text can
never become one of them, `<s>` and `</s>` are spelled out like any other text; characters outside the vocabulary
become bytes, so every NFC text with single blanks survives encode and decode; frequent placeholders (`%(name)s`, `{0}`)
are one piece each. Training is deterministic: same text and settings, same bytes.
Refuses (CorpusError): a vocabulary larger than the text supports, a model with other ids.
"""

from __future__ import annotations

import io
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from cvm_translator.config.schema import TokenizerConfig
from cvm_translator.corpus.build import load_split
from cvm_translator.corpus.records import Pair
from cvm_translator.errors import CorpusError
from cvm_translator.metrics.placeholders import find_placeholders
from cvm_translator.runs.atomic import read_json, sha256_file, sha256_json, write_bytes, write_json

BOS_ID, PAD_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
MODEL_NAME = "sentencepiece.model"
FORMAT_VERSION = 1
"""Grows whenever the same text and settings would give another model."""

COMMON_PLACEHOLDERS = ("%s", "%d", "{}", "{0}", "{1}")
MIN_PLACEHOLDER_COUNT = 5
MAX_PLACEHOLDER_SHARE = 0.05
"""Of the vocabulary that may go to placeholders."""
MAX_TRAINING_TEXTS = 4_000_000
MAX_MODEL_BYTES = 64 << 20


class Tokenizer:
    """Text to ids and back."""

    BOS_ID, PAD_ID, EOS_ID, UNK_ID = BOS_ID, PAD_ID, EOS_ID, UNK_ID

    def __init__(self, processor: Any, path: Path, sha256: str) -> None:
        self._processor = processor
        self.path = path
        self.sha256 = sha256
        self.vocab_size: int = processor.get_piece_size()

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """Load a SentencePiece model file; one that is no model, or has other ids, is refused."""
        if not path.is_file():
            raise CorpusError(f"tokenizer model {path} does not exist: correct tokenizer.path or build the tokenizer")
        if path.stat().st_size > MAX_MODEL_BYTES:
            raise CorpusError(f"{path} is {path.stat().st_size} bytes, too large for a SentencePiece model")
        processor = sentencepiece.SentencePieceProcessor()
        try:
            processor.LoadFromSerializedProto(path.read_bytes())
        except (RuntimeError, OSError, ValueError) as error:
            raise CorpusError(f"{path} is no SentencePiece model: name another tokenizer.path") from error
        found = (processor.bos_id(), processor.pad_id(), processor.eos_id(), processor.unk_id())
        if found != (BOS_ID, PAD_ID, EOS_ID, UNK_ID):
            raise CorpusError(
                f"{path} has ids bos, pad, eos, unk = {found}, expected {(BOS_ID, PAD_ID, EOS_ID, UNK_ID)}: train it "
                "with --bos_id=0 --pad_id=1 --eos_id=2 --unk_id=3, or leave tokenizer.path out"
            )
        return cls(processor, path, sha256_file(path))

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, without marks of begin or end."""
        ids: list[list[int]] = self._processor.encode([unicodedata.normalize("NFC", text) for text in texts])
        return ids

    def decode(self, ids: Sequence[Sequence[int]]) -> list[str]:
        """The texts; marks (bos, pad, eos) vanish, broken byte sequences show as the replacement character."""
        if not ids:
            return []
        plain = [[int(i) for i in row if int(i) not in (BOS_ID, PAD_ID, EOS_ID)] for row in ids]
        texts: list[str] = self._processor.decode(plain)
        return texts

    def id_to_piece(self, index: int) -> str:
        return str(self._processor.id_to_piece(index))


def build_tokenizer(
    config: TokenizerConfig,
    corpus_dir: Path,
    directory: Path,
    report: Callable[[str], None],
    *,
    base_dir: Path | None = None,
    train_sha256: str | None = None,
) -> Tokenizer:
    """Train (or copy in) the tokenizer of a run, or reuse the one in `directory`.

    `base_dir` is the folder to which a relative `config.path` refers (default: the current one);
    `train_sha256` the hash of the training split, where somebody has just read it.
    """
    base_dir = base_dir or Path()
    text = _find_text(config, corpus_dir, base_dir)
    text_sha256 = train_sha256 if train_sha256 and config.path is None else sha256_file(text)
    inputs = {
        "config": config.model_dump(mode="json"),
        "text": text_sha256,
        "format_version": FORMAT_VERSION,
    }
    manifest_path, model_path = directory / "manifest.json", directory / MODEL_NAME
    manifest = _read_manifest(manifest_path)
    if manifest.get("inputs") == sha256_json(inputs) and model_path.is_file():
        if sha256_file(model_path) == manifest.get("sha256"):
            report(f"tokenizer: reused {model_path}")
            return Tokenizer.load(model_path)
        report(f"tokenizer: {model_path} is damaged, building it again")
    manifest_path.unlink(missing_ok=True)
    if config.path is not None:
        tokenizer = Tokenizer.load(base_dir / config.path)
        model = tokenizer.path.read_bytes()
    else:
        model = train_sentencepiece(load_split(corpus_dir, "train"), config)
    write_bytes(model_path, model)
    tokenizer = Tokenizer.load(model_path)
    data = {"inputs": sha256_json(inputs), "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size}
    write_json(manifest_path, data)
    report(f"tokenizer: {tokenizer.vocab_size:,} pieces in {model_path}")
    return tokenizer


def _find_text(config: TokenizerConfig, corpus_dir: Path, base_dir: Path) -> Path:
    """The file that decides the tokenizer: the given model, or the training split."""
    path = corpus_dir / "train.tsv" if config.path is None else base_dir / config.path
    if not path.is_file():
        name = "tokenizer.path" if config.path is not None else "tokenizer: the training split"
        raise CorpusError(f"{name} {path} does not exist: correct tokenizer.path or build the corpus first")
    return path


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        data = read_json(path)
    except (FileNotFoundError, ValueError):  # absent or damaged alike: built again
        return {}
    return data if isinstance(data, dict) else {}


def choose_placeholders(pairs: Iterable[Pair], vocab_size: int) -> list[str]:
    """Placeholders that become one piece each: the most frequent ones of the text and a few that are always there."""
    counts: Counter[str] = Counter()
    for pair in pairs:
        if "%" in pair.source or "{" in pair.source:
            counts.update(name for name in find_placeholders(pair.source) if " " not in name)
    room = max(len(COMMON_PLACEHOLDERS), int(MAX_PLACEHOLDER_SHARE * vocab_size))
    frequent = (name for name, count in counts.items() if count >= MIN_PLACEHOLDER_COUNT)
    ranked = sorted(frequent, key=lambda name: (-counts[name], name))
    return list(dict.fromkeys([*COMMON_PLACEHOLDERS, *ranked]))[:room]


def train_sentencepiece(pairs: Sequence[Pair], config: TokenizerConfig) -> bytes:
    """Train on both sides of the pairs; the serialised model."""
    stride = max(1, -(-2 * len(pairs) // MAX_TRAINING_TEXTS))

    def texts() -> Iterator[str]:
        for pair in itertools.islice(pairs, 0, None, stride):
            yield pair.source
            yield pair.target

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=texts(),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            bos_id=BOS_ID,
            pad_id=PAD_ID,
            eos_id=EOS_ID,
            unk_id=UNK_ID,
            byte_fallback=True,
            normalization_rule_name="identity",
            user_defined_symbols=choose_placeholders(pairs, config.vocab_size),
            split_digits=True,
            max_sentence_length=20_000,
            num_threads=1,  # the number of threads changes the sums and so the pieces
            minloglevel=2,
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise _explain_failure(config, str(error)) from error
    return model.getvalue()


def _explain_failure(config: TokenizerConfig, message: str) -> CorpusError:
    limit = re.search(r"value <= (\d+)", message)
    if limit:
        return CorpusError(
            f"tokenizer.vocab_size {config.vocab_size} is more than this corpus allows: set it to {limit.group(1)} or "
            "less, or add text"
        )
    if "required_chars" in message or "smaller than" in message:
        return CorpusError(
            f"tokenizer.vocab_size {config.vocab_size} is too small for the characters, bytes and placeholders of this "
            f"corpus ({' '.join(message.split())[-120:]}): set a larger one or a lower character_coverage"
        )
    return CorpusError(f"tokenizer: SentencePiece cannot train on this corpus: {message}")
