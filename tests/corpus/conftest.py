"""Small corpora made on the spot."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polib
import pytest
from numpy.typing import NDArray

from cvm_translator.config.schema import GettextPackage
from cvm_translator.corpus.readers import ReaderContext
from cvm_translator.corpus.records import Pair
from cvm_translator.corpus.text import hash_key, make_key

COLOURS = ["rote", "blaue", "grüne", "gelbe", "schwarze", "weiße", "graue", "braune"]
COLOURS_EN = ["red", "blue", "green", "yellow", "black", "white", "grey", "brown"]
THINGS = ["Datei", "Tabelle", "Zeile", "Lampe", "Tür", "Karte", "Seite", "Liste", "Schrift", "Farbe"]
THINGS_EN = ["file", "table", "line", "lamp", "door", "map", "page", "list", "font", "paint"]
VERBS = ["fehlt", "wartet", "bleibt", "verschwindet", "erscheint", "wächst", "schrumpft", "dreht sich"]
VERBS_EN = ["is missing", "waits", "stays", "disappears", "appears", "grows", "shrinks", "turns around"]


def make_sentences(count: int) -> list[tuple[str, str]]:
    """Different German sentences with their English translations (640 at most)."""
    sentences = [
        (f"Die {colour} {thing} {verb}.", f"The {colour_en} {thing_en} {verb_en}.")
        for colour, colour_en in zip(COLOURS, COLOURS_EN, strict=True)
        for thing, thing_en in zip(THINGS, THINGS_EN, strict=True)
        for verb, verb_en in zip(VERBS, VERBS_EN, strict=True)
    ]
    return sentences[:count]


def write_tsv(path: Path, sentences: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f"{source}\t{target}\n" for source, target in sentences), encoding="utf-8")
    return path


def make_po(entries: list[polib.POEntry], language: str = "de") -> polib.POFile:
    catalogue = polib.POFile()
    catalogue.metadata = {
        "Content-Type": "text/plain; charset=utf-8",
        "Language": language,
        "Plural-Forms": "nplurals=2; plural=(n != 1);",
    }
    catalogue.extend(entries)
    return catalogue


def make_mo_bytes(catalogue: polib.POFile) -> bytes:
    data = catalogue.to_binary()
    assert isinstance(data, bytes)
    return data


def write_wheel(folder: Path, name: str, members: dict[str, bytes], version: str = "1.0") -> GettextPackage:
    """A wheel that pip accepts, holding `members`; returns its pinned description."""
    info = f"{name}-{version}.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, data in {**members, **metadata}.items():
            archive.writestr(member, data)
        archive.writestr(f"{info}/RECORD", "".join(f"{member},,\n" for member in {**members, **metadata}))
    path = folder / f"{name}-{version}-py3-none-any.whl"
    path.write_bytes(buffer.getvalue())
    return GettextPackage(name=name, version=version, sha256=hashlib.sha256(buffer.getvalue()).hexdigest())


@pytest.fixture
def make_context(tmp_path: Path) -> Callable[..., ReaderContext]:
    def make(**changes: object) -> ReaderContext:
        settings = {
            "source_language": "de",
            "target_language": "en",
            "base_dir": tmp_path,
            "cache_dir": tmp_path / "cache",
            "max_line_bytes": 10_000,
            "report": lambda message: None,
        }
        return ReaderContext(**{**settings, **changes})  # type: ignore[arg-type]

    return make


@pytest.fixture
def local_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the only package index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_INDEX_URL", "PIP_CERT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def compute_keys(pairs: Sequence[Pair]) -> NDArray[np.uint64]:
    """Hashes of the near-duplicate keys of both sides, (N, 2)."""
    keys = [[hash_key(make_key(pair.source)), hash_key(make_key(pair.target))] for pair in pairs]
    return np.array(keys, dtype=np.uint64).reshape(-1, 2)
