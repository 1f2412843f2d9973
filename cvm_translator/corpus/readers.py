"""Readers: every source of the configuration as a stream of pairs and malformed rows.

Guarantees: a row is yielded as a pair, quarantined with a reason, or counted as skipped; none is lost, a last line
without newline included. Memory stays flat: a line longer than the limit is passed over without being decoded.
Refuses (CorpusError): files that are missing or not files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, BinaryIO

from cvm_translator.config.schema import (
    GettextSource,
    HuggingFaceSource,
    JsonlSource,
    PlainSource,
    Source,
    TsvSource,
)
from cvm_translator.corpus.gettext_reader import read_gettext
from cvm_translator.corpus.records import BadRow, Pair, Record, make_excerpt, make_pair
from cvm_translator.errors import CorpusError, import_optional

SKIP_CHUNK_BYTES = 1 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class ReaderContext:
    """What readers need beside their own settings."""

    source_language: str
    target_language: str
    base_dir: Path
    """Folder to which relative paths refer."""
    cache_dir: Path
    """Folder of the downloaded packages."""
    max_line_bytes: int
    report: Callable[[str], None]


class Line:
    """One physical line: its text, or the reason why it has none."""

    __slots__ = ("defect", "number", "raw", "text")

    def __init__(self, number: int, raw: bytes, defect: str | None = None) -> None:
        self.number = number
        self.raw = raw
        self.defect = defect
        self.text = ""
        if defect is None:
            try:
                self.text = raw.decode("utf-8")
            except UnicodeDecodeError:
                self.defect = "invalid_utf8"
        if self.defect is None and "\0" in self.text:
            self.defect = "nul_character"


def open_text(path: Path) -> BinaryIO:
    """Open a corpus file, or say which one cannot be read."""
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise CorpusError(f"corpus file {path} does not exist: correct the path in the config") from None
    except OSError as error:
        raise CorpusError(
            f"corpus file {path} cannot be read ({error.strerror}): correct the path or the rights"
        ) from error


def read_lines(path: Path, max_line_bytes: int) -> Iterator[Line]:
    """Lines of a UTF-8 file ending in LF or CRLF; a byte order mark is dropped."""
    with open_text(path) as stream:
        number = 0
        while raw := stream.readline(max_line_bytes + 2):
            number += 1
            if len(raw) > max_line_bytes and not raw.endswith(b"\n"):
                yield Line(number, raw[: 4 * 120], "line_too_long")
                while raw and not raw.endswith(b"\n"):
                    raw = stream.readline(SKIP_CHUNK_BYTES)
                continue
            if number == 1:
                raw = raw.removeprefix(BYTE_ORDER_MARK)
            yield Line(number, raw.rstrip(b"\r\n"))


def read_tsv(source: TsvSource, context: ReaderContext) -> Iterator[Record]:
    path = context.base_dir / source.path
    needed = max(source.source_column, source.target_column)
    for line in read_lines(path, context.max_line_bytes):
        origin = f"{source.path}:{line.number}"
        if line.defect:
            yield BadRow(origin, line.defect, make_excerpt(line.raw))
            continue
        columns = line.text.split("\t")
        if len(columns) <= needed:
            reason = "empty_line" if not line.text.strip() else "no_tab" if len(columns) == 1 else "missing_column"
            yield BadRow(origin, reason, make_excerpt(line.text))
        else:
            yield make_pair(columns[source.source_column], columns[source.target_column], origin)


def look_up(record: object, dotted_key: str) -> Any:
    """The value at a dotted key; KeyError if a part is missing. A key that contains the dots itself is found too."""
    if isinstance(record, dict) and dotted_key in record:
        return record[dotted_key]
    for part in dotted_key.split("."):
        if not isinstance(record, dict) or part not in record:
            raise KeyError(dotted_key)
        record = record[part]
    return record


def read_jsonl(source: JsonlSource, context: ReaderContext) -> Iterator[Record]:
    path = context.base_dir / source.path
    for line in read_lines(path, context.max_line_bytes):
        origin = f"{source.path}:{line.number}"
        if line.defect:
            yield BadRow(origin, line.defect, make_excerpt(line.raw))
            continue
        if not line.text.strip():
            yield BadRow(origin, "empty_line", "")
            continue
        try:
            record = json.loads(line.text)
            pair = make_pair(look_up(record, source.source_key), look_up(record, source.target_key), origin)
        except (ValueError, RecursionError):
            yield BadRow(origin, "not_json", make_excerpt(line.text))
        except KeyError:
            yield BadRow(origin, "missing_key", make_excerpt(line.text))
        else:
            yield pair


def read_plain(source: PlainSource, context: ReaderContext) -> Iterator[Record]:
    """Line n of one file with line n of the other; lines beyond the shorter file's end are quarantined."""
    source_lines = read_lines(context.base_dir / source.source_path, context.max_line_bytes)
    target_lines = read_lines(context.base_dir / source.target_path, context.max_line_bytes)
    for source_line, target_line in zip_longest(source_lines, target_lines):
        if source_line is None or target_line is None:
            line, path = (source_line, source.source_path) if source_line else (target_line, source.target_path)
            yield BadRow(f"{path}:{line.number}", "uneven_line_count", make_excerpt(line.raw))
            continue
        for line, path in ((source_line, source.source_path), (target_line, source.target_path)):
            if line.defect:
                yield BadRow(f"{path}:{line.number}", line.defect, make_excerpt(line.raw))
                break
        else:
            yield make_pair(source_line.text, target_line.text, f"{source.source_path}:{source_line.number}")


def read_huggingface(source: HuggingFaceSource, context: ReaderContext) -> Iterator[Record]:
    """Rows of a Hugging Face data set; a path that exists beside the config is taken as local."""
    datasets = import_optional("datasets", "huggingface")
    datasets.disable_progress_bars()
    source_key = source.source_key or f"translation.{context.source_language}"
    target_key = source.target_key or f"translation.{context.target_language}"
    local = context.base_dir / source.path
    path = str(local) if local.exists() else source.path
    try:
        if (local / "dataset_dict.json").exists() or (local / "state.json").exists():
            rows = _choose_split(datasets.load_from_disk(path), source.split)
        elif local.is_file():
            kind = local.suffix.lstrip(".").replace("jsonl", "json")
            rows = datasets.load_dataset(kind, data_files=path, split=source.split)
        else:
            rows = datasets.load_dataset(path, source.name, split=source.split)
    except Exception as error:  # the library raises many kinds, its own and its dependencies'
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorpusError(
            f"Hugging Face dataset {source.path} (name {source.name}, split {source.split}) cannot be loaded: "
            f"{reason}; check path, name and split, or the network"
        ) from error
    for number, row in enumerate(rows):
        origin = f"{source.path}:{source.split}:{number}"
        try:
            yield make_pair(look_up(row, source_key), look_up(row, target_key), origin)
        except KeyError as error:
            yield BadRow(origin, "missing_key", make_excerpt(f"{error} not in {sorted(row)}"))


def _choose_split(saved: Any, split: str) -> Any:
    """The rows of a split of what `save_to_disk` wrote: a dictionary of splits, or one, which may not know its name."""
    known = sorted(saved) if isinstance(saved, dict) else [str(saved.split or split)]
    if split not in known:
        raise ValueError(f"it has no such split, but {', '.join(known)}")
    return saved[split] if isinstance(saved, dict) else saved


def read_gettext_source(source: GettextSource, context: ReaderContext) -> Iterator[Record]:
    return read_gettext(
        source,
        source_language=context.source_language,
        target_language=context.target_language,
        base_dir=context.base_dir,
        cache_dir=context.cache_dir,
        report=context.report,
    )


READERS: dict[str, Callable[[Any, ReaderContext], Iterator[Record]]] = {
    "tsv": read_tsv,
    "jsonl": read_jsonl,
    "plain": read_plain,
    "gettext": read_gettext_source,
    "huggingface": read_huggingface,
}


def read_source(source: Source, context: ReaderContext) -> Iterator[Record]:
    """All records of one source, in file order."""
    return READERS[source.format](source, context)


__all__ = ["READERS", "BadRow", "Pair", "ReaderContext", "Record", "read_lines", "read_source"]
