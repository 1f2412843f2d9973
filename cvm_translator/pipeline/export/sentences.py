"""What an export is tried on: the run's validation sentences, a file, or a few built-in ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from cvm_translator.corpus.build import load_split
from cvm_translator.corpus.records import Pair
from cvm_translator.errors import CorpusError
from cvm_translator.pipeline.places import find_run
from cvm_translator.pipeline.scoring import read_pairs
from cvm_translator.runs.layout import RunLayout

T = TypeVar("T")

NUM_UNREFERENCED = 200
"""Sentences that show whether two runtimes agree."""

_SUBJECTS = {
    "de": "Die Datei|Das Fenster|Der Benutzer|Die Nachricht|Das Programm|Der Ordner|Die Sprache|Der Server|Das Bild",
    "en": "The file|The window|The user|The message|The program|The folder|The language|The server|The image",
}
_PREDICATES = {
    "de": "wurde gestern gelöscht.|ist nicht verfügbar.|kann nicht geöffnet werden!|muss noch einmal geprüft werden.|"
    "steht auf Seite 12.|ist größer als 4,5 MB.|wird gerade geladen …|war früher besser, oder?|"
    "gehört zu einem anderen Projekt, das wir nicht kennen.|hat drei neue Namen bekommen.",
    "en": "was deleted yesterday.|is not available.|cannot be opened!|has to be checked once more.|is on page 12.|"
    "is larger than 4.5 MB.|is being loaded …|used to be better, no?|"
    "belongs to another project that we do not know.|has been given three new names.",
}
"""Other languages get the English ones: they show whether two runtimes agree, not how well they translate."""


@dataclass(frozen=True)
class Sentences:
    """Sources, with references where there are any, and where they come from."""

    sources: list[str]
    references: list[str] | None
    origin: str


def choose_sentences(model: Path, file: Path | None, source_language: str, num_sentences: int | None) -> Sentences:
    """The sentences of `file`, of the run's validation set, or the built-in ones.

    At most `num_sentences`, evenly spaced; by default all that have references, else NUM_UNREFERENCED.
    """
    if file is not None:
        lines = _read_lines(file)
        rows = [line.split("\t") for line in lines]
        has_references = all(len(row) > 1 and row[1].strip() for row in rows)
        chosen = spaced(rows, num_sentences or (len(rows) if has_references else NUM_UNREFERENCED))
        references = [row[1] for row in chosen] if has_references else None
        return Sentences([row[0] for row in chosen], references, str(file))
    layout = find_run(model)
    if layout is not None:
        validation = load_split(layout.corpus, "validation")
        pairs = spaced(validation, num_sentences or len(validation))
        return Sentences(
            [pair.source for pair in pairs], [pair.target for pair in pairs], str(layout.corpus / "validation.tsv")
        )
    language = source_language if source_language in _SUBJECTS else "en"
    built_in = [
        f"{subject} {predicate}"
        for subject in _SUBJECTS[language].split("|")
        for predicate in _PREDICATES[language].split("|")
    ]
    return Sentences(spaced(built_in, num_sentences or NUM_UNREFERENCED), None, "built-in sentences")


def load_map_pairs(corpus: Path) -> Sequence[Pair]:
    """The training pairs of a run folder, or those of a TSV file."""
    if corpus.is_dir():
        return load_split(RunLayout(corpus).corpus, "train")
    if not corpus.exists():
        raise CorpusError(f"--corpus {corpus} does not exist: name a run folder or a TSV file of sentence pairs")
    return read_pairs(corpus)


def _read_lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not valid UTF-8 ({error.reason}): convert it to UTF-8") from error
    lines = [line for line in text.split("\n") if line.split("\t", 1)[0].strip()]
    if not lines:
        raise CorpusError(f"{path} holds no sentences: expected one a line, with a tab and a reference where known")
    return lines


def spaced(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spaced."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]
