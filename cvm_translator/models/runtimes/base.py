"""What all runtimes share: how lines become ids, where outputs end, and what an exported folder says of itself."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvm_translator.corpus.records import Pair
from cvm_translator.errors import ModelError
from cvm_translator.models.decoding import MAX_LENGTH_EXTRA, MAX_LENGTH_RATIO, TextTokenizer, translate_lines
from cvm_translator.runs.atomic import read_json

EXPORT_FILE = "cvm_translator.json"
"""In an exported folder: format, number_format, max_length, languages, and what its verification found."""


@dataclass(frozen=True)
class RuntimeSettings:
    """How a runtime uses the machine."""

    device: str = "cpu"
    num_threads: int | None = None
    """Threads within one batch; None leaves the choice to the library."""
    num_workers: int | None = None
    """Batches translated at the same time (CTranslate2); None: one, or where num_threads is open too, one a core."""
    precision: str = "float32"
    """What a float32 model computes in: float32 or bfloat16 (native)."""


class Runtime(abc.ABC):
    """A loaded model."""

    tokenizer: TextTokenizer
    facts: dict[str, Any]
    """At least format, number_format, max_length, num_parameters, source_language and target_language."""
    num_bytes: int
    """Of the files that hold the weights."""
    best_batch_size = 64
    """Sentences that are best decoded together where nobody says how many."""

    @abc.abstractmethod
    def __init__(self, path: Path, settings: RuntimeSettings) -> None:
        """Load the model; raises ModelError if it cannot be."""

    @abc.abstractmethod
    def translate_ids(
        self, sources: Sequence[Sequence[int]], *, beam_size: int = 1, batch_size: int = 128
    ) -> list[list[int]]:
        """Sources without end mark, at most max_length − 1 tokens each; results without special ids, in order."""

    def translate(self, texts: Sequence[str], *, beam_size: int = 1, batch_size: int = 128) -> list[str]:
        """One line for each line; see `translate_lines`."""
        return translate_lines(
            self.tokenizer,
            texts,
            self.facts["max_length"] - 1,
            lambda sources: self.translate_ids(sources, beam_size=beam_size, batch_size=batch_size),
        )

    def measure_references(self, pairs: Sequence[Pair], batch_size: int = 128) -> list[list[float]] | None:
        """Nats and tokens of each pair's reference (zeros for a pair too long); None where a runtime cannot tell."""
        return None


def load_export_facts(folder: Path, format_name: str) -> dict[str, Any]:
    """What an exported folder says of itself; raises ModelError if it is not one of this format."""
    path = folder / EXPORT_FILE
    if not folder.exists():
        raise ModelError(f"there is no model folder {folder}: check the path")
    if not path.is_file():
        model = folder / "student" if (folder / "student").is_dir() else folder
        raise ModelError(
            f"{folder} is no {format_name} export: it has no {EXPORT_FILE}; make one with cvm-translator export"
            f" --model {model} --format {format_name} --output {model / format_name}, and name that folder"
        )
    try:
        facts = read_json(path)
        found = facts["format"]
        int(facts["max_length"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path} cannot be read ({error}): export the model again") from error
    if found != format_name:
        raise ModelError(f"{folder} is a {found} export, not {format_name}: name another runtime or folder")
    return dict(facts)


def limit_output(source_length: int, max_length: int) -> int:
    """The most tokens of a translation, end mark not counted; the native decoder's rule."""
    return min(int(MAX_LENGTH_RATIO * source_length) + MAX_LENGTH_EXTRA, max_length - 1)


def cut_batches(sources: Sequence[Sequence[int]], num_sentences: int) -> Iterator[list[int]]:
    """Indices of the sources in batches of like lengths, longest first, as the native decoder does it."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]), reverse=True)
    for start in range(0, len(order), max(1, num_sentences)):
        yield order[start : start + max(1, num_sentences)]
