"""A split as token ids on disk, made once for each tokenizer and memory-mapped afterwards.

The folder holds the ids of each side one sentence after the other (two bytes an id where the vocabulary allows it), the
number of ids of each sentence, and manifest.json, which is written last and names the split's and the tokenizer's hash
and that of each file. Whoever opens them reads them once to verify them and keeps but the sentences' places in memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cvm_translator.corpus.parallel import map_in_order
from cvm_translator.corpus.split_file import SplitFile, parse_line
from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.runs.atomic import TEMPORARY_PREFIX, new_folder, read_json, sha256_file, sha256_json, write_json

CHUNK_PAIRS = 20_000
SIDES = ("source", "target")
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Side:
    """The ids of one side of all pairs."""

    tokens: NDArray[np.integer[Any]]
    offsets: NDArray[np.int64]
    """(N + 1,) where each sentence begins."""

    def __getitem__(self, index: int) -> NDArray[np.integer[Any]]:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class TokenFiles:
    """An open folder of token ids."""

    source: Side
    target: Side
    sha256: str
    """Of all ids and where each sentence begins."""


def obtain_tokens(split: SplitFile, tokenizer: Tokenizer, directory: Path) -> TokenFiles:
    """Open the ids of a split in `directory`, making them first where they are missing, damaged or of other text."""
    inputs = {"split": split.sha256, "tokenizer": tokenizer.sha256, "format_version": FORMAT_VERSION}
    hashes = _read_hashes(directory, inputs)
    if hashes is None:
        for left in (directory, *directory.parent.glob(f"{TEMPORARY_PREFIX}{directory.name}-*")):
            shutil.rmtree(left, ignore_errors=True)
        with new_folder(directory) as folder:
            hashes = _write(split, tokenizer, folder)
            write_json(folder / "manifest.json", {"inputs": inputs, "files": hashes})
    source, target = (_open_side(directory, name, tokenizer.vocab_size) for name in SIDES)
    return TokenFiles(source, target, sha256_json(hashes))


def _read_hashes(directory: Path, inputs: dict[str, Any]) -> dict[str, str] | None:
    """The hash of each file, if the folder is whole and of these inputs."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        manifest = read_json(directory / "manifest.json")
        hashes: dict[str, str] = manifest["files"]
        if manifest["inputs"] == inputs and all(sha256_file(directory / name) == hashes[name] for name in _names()):
            return hashes
    return None


def _names() -> list[str]:
    return [f"{side}.{kind}" for side in SIDES for kind in ("ids", "lengths")]


def _choose_type(vocab_size: int) -> type[np.integer[Any]]:
    return np.uint16 if vocab_size <= 1 << 16 else np.int32


def _open_side(directory: Path, name: str, vocab_size: int) -> Side:
    lengths = np.fromfile(directory / f"{name}.lengths", dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    path = directory / f"{name}.ids"
    if not path.stat().st_size:  # nothing can be mapped
        return Side(np.empty(0, dtype=_choose_type(vocab_size)), offsets)
    return Side(np.asarray(np.memmap(path, dtype=_choose_type(vocab_size), mode="r")), offsets)


# ------------------------------------------------------------------------------------------------------------- making


def _write(split: SplitFile, tokenizer: Tokenizer, folder: Path) -> dict[str, str]:
    """Tokenise all pairs into `folder`; the hash of each file."""
    offsets = split.offsets[::CHUNK_PAIRS].tolist()
    if offsets[-1] != split.offsets[-1]:
        offsets.append(int(split.offsets[-1]))
    encode = partial(_encode, split.path, tokenizer.path, tokenizer.sha256)
    digests = {name: hashlib.sha256() for name in _names()}
    with contextlib.ExitStack() as stack:
        streams: dict[str, BinaryIO] = {name: stack.enter_context(open(folder / name, "wb")) for name in _names()}
        for chunk in map_in_order(encode, itertools.pairwise(offsets)):
            for name, data in zip(_names(), chunk, strict=True):
                streams[name].write(data)
                digests[name].update(data)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _encode(path: Path, tokenizer_path: Path, tokenizer_sha256: str, span: tuple[int, int]) -> list[bytes]:
    """The pairs of these bytes of a split's file as bytes of each file of the folder, in the order of `_names`."""
    tokenizer = _load_tokenizer(tokenizer_path, tokenizer_sha256)
    with open(path, "rb") as stream:
        stream.seek(span[0])
        pairs = [parse_line(line) for line in stream.read(span[1] - span[0]).split(b"\n")[:-1]]
    made: list[bytes] = []
    for texts in ([pair.source for pair in pairs], [pair.target for pair in pairs]):
        rows = tokenizer.encode(texts)
        flat = np.fromiter((index for row in rows for index in row), dtype=_choose_type(tokenizer.vocab_size))
        made += [flat.tobytes(), np.array([len(row) for row in rows], dtype=np.int32).tobytes()]
    return made


@functools.lru_cache(maxsize=1)
def _load_tokenizer(path: Path, sha256: str) -> Tokenizer:
    tokenizer = Tokenizer.load(path)
    assert tokenizer.sha256 == sha256, f"{path} changed while it was used"
    return tokenizer
