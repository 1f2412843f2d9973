"""What a corpus was made from and what it consists of, by hashes.

Guarantees: two corpora with equal `sha256` hold the same bytes. An input is identified by its content, not by its date.
Refuses (CorpusError): to go on when an input differs from the one recorded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cvm_translator.config.schema import (
    CorpusConfig,
    GettextSource,
    HuggingFaceSource,
    JsonlSource,
    PlainSource,
    Source,
    TsvSource,
)
from cvm_translator.corpus.gettext_reader import find_catalogue_language, list_catalogue_files
from cvm_translator.corpus.packages import describe_package
from cvm_translator.errors import CorpusError
from cvm_translator.runs.atomic import read_json, sha256_file, sha256_json, write_json

FORMAT_VERSION = 1
"""Grows whenever the same inputs would give other outputs."""


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    inputs: dict[str, Any]
    """`settings` (config and seed) and `files` (SHA-256 by name)."""
    outputs: dict[str, str]
    """SHA-256 by file name."""
    sizes: dict[str, int]
    filters: dict[str, int]
    quarantine: dict[str, int]

    @property
    def sha256(self) -> str:
        return sha256_json(self.outputs)

    def check_inputs(self, inputs: dict[str, Any], directory: Path) -> None:
        """Raise if the corpus in `directory` was made from other inputs."""
        old, new = self.inputs["files"], inputs["files"]
        changed = [name for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]
        if changed and self.inputs["settings"] == inputs["settings"]:
            raise CorpusError(
                f"corpus: {', '.join(changed)} changed since the corpus in {directory} was built from it: a run never "
                "goes on with other data; restore the file or start a run in a new output_dir"
            )
        if self.inputs != inputs:
            names = [key for key in inputs["settings"] if inputs["settings"][key] != self.inputs["settings"].get(key)]
            names += sorted(old.keys() ^ new.keys())
            raise CorpusError(
                f"corpus: the corpus in {directory} was built with other settings or files "
                f"({', '.join(names) or 'format'}): restore them or start a run in a new output_dir"
            )

    def find_damaged(self, directory: Path, names: Iterable[str] | None = None) -> list[str]:
        """Outputs that are missing or differ from their hash."""
        chosen = self.outputs if names is None else names
        return [
            name
            for name in chosen
            if not (directory / name).is_file() or sha256_file(directory / name) != self.outputs[name]
        ]


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a finished corpus; None where there is none."""
    path = directory / "manifest.json"
    if not path.is_file():
        return None
    try:
        data = read_json(path)
        if data.pop("format_version") != FORMAT_VERSION:
            return None
        data.pop("sha256")
        return Manifest(**data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorpusError(f"{path} is not a corpus manifest ({error}): delete it to build the corpus again") from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    data = {"format_version": FORMAT_VERSION, "sha256": manifest.sha256, **asdict(manifest)}
    write_json(directory / "manifest.json", data)


def describe_source(source: Source) -> str:
    """A source in a few words, for counts and messages."""
    match source:
        case PlainSource():
            return f"{source.source_path} + {source.target_path}"
        case GettextSource(packages=[_, *_]):
            return ", ".join(describe_package(package) for package in source.packages)
        case HuggingFaceSource():
            return f"{source.path}:{source.split}"
        case _:
            return str(source.path)


def hash_inputs(config: CorpusConfig, base_dir: Path, seed: int) -> dict[str, Any]:
    """Everything that decides the outputs: settings, seed, and the hash of each input file.

    Packages are identified by the hashes in the settings, Hugging Face names by name alone (local ones by content).
    """
    settings = config.model_dump(mode="json", exclude={"cache_dir"}) | {"seed": seed}
    files: dict[str, str] = {}
    for role in ("train", "validation", "test", "unseen"):
        for source in getattr(config, role):
            for name in list_files(source, config, base_dir):
                if name not in files:
                    files[name] = _hash_file(base_dir / name)
    return {"settings": settings, "files": files}


def _hash_file(path: Path) -> str:
    try:
        return sha256_file(path)
    except FileNotFoundError:
        raise CorpusError(f"corpus file {path} does not exist: correct the path in the config") from None
    except OSError as error:
        raise CorpusError(
            f"corpus file {path} cannot be read ({error.strerror}): correct the path or the rights"
        ) from error


def list_files(source: Source, config: CorpusConfig, base_dir: Path) -> list[str]:
    """The local files a source reads, relative to `base_dir`."""
    match source:
        case TsvSource() | JsonlSource():
            return [str(source.path)]
        case PlainSource():
            return [str(source.source_path), str(source.target_path)]
        case GettextSource(path=Path() as path):
            language = find_catalogue_language(source, config.source_language, config.target_language)
            if (base_dir / path).is_file():
                return [str(path)]
            return [f"{path}/{name}" for name in list_catalogue_files(base_dir / path, str(path), language)]
        case HuggingFaceSource():
            local = base_dir / source.path
            if local.is_file():
                return [source.path]
            if local.is_dir():
                return sorted(str(p.relative_to(base_dir)) for p in local.rglob("*") if p.is_file())
    return []
