"""Readers: nothing lost, everything malformed named, hostile lines survived."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvm_translator.config.schema import HuggingFaceSource, JsonlSource, PlainSource, TsvSource
from cvm_translator.corpus.readers import READERS, ReaderContext, read_source
from cvm_translator.corpus.records import BadRow, Pair, Record
from cvm_translator.errors import CorpusError, MissingDependencyError

MakeContext = Callable[..., ReaderContext]


def read_bytes(tmp_path: Path, data: bytes, context: ReaderContext, **keys: object) -> list[Record]:
    (tmp_path / "t.tsv").write_bytes(data)
    return list(read_source(TsvSource(format="tsv", path=Path("t.tsv"), **keys), context))


def test_a_reader_for_every_format() -> None:
    assert set(READERS) == {"tsv", "jsonl", "plain", "gettext", "huggingface"}


def test_tsv_keeps_the_last_line_and_takes_crlf_and_byte_order_mark(tmp_path: Path, make_context: MakeContext) -> None:
    records = read_bytes(tmp_path, b"\xef\xbb\xbfeins\tone\r\nzwei\ttwo\textra\ndrei\tthree", make_context())
    assert records == [Pair("eins", "one", "t.tsv:1"), Pair("zwei", "two", "t.tsv:2"), Pair("drei", "three", "t.tsv:3")]


def test_tsv_columns_can_be_chosen(tmp_path: Path, make_context: MakeContext) -> None:
    records = read_bytes(tmp_path, b"7\tone\teins\n8\ttwo\n", make_context(), source_column=2, target_column=1)
    assert records[0] == Pair("eins", "one", "t.tsv:1")
    assert isinstance(records[1], BadRow) and records[1].reason == "missing_column"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"kein Tabulator", "no_tab"),
        (b"eins\t", "empty_side"),
        (b"\tone", "empty_side"),
        (b"", "empty_line"),
        (b"ein\xffs\tone", "invalid_utf8"),
        (b"ein\0s\tone", "nul_character"),
        (b"\xed\xa0\x80\tone", "invalid_utf8"),  # a surrogate in UTF-8
        (b"x" * 20_000 + b"\tone", "line_too_long"),
    ],
)
def test_tsv_names_each_defect(tmp_path: Path, make_context: MakeContext, line: bytes, reason: str) -> None:
    records = read_bytes(tmp_path, b"eins\tone\n" + line + b"\nzwei\ttwo\n", make_context())
    assert [record.origin for record in records] == ["t.tsv:1", "t.tsv:2", "t.tsv:3"]
    bad = records[1]
    assert isinstance(bad, BadRow) and bad.reason == reason
    assert "\n" not in bad.excerpt and "\t" not in bad.excerpt


def test_a_long_line_takes_no_memory(tmp_path: Path, make_context: MakeContext) -> None:
    (tmp_path / "t.tsv").write_bytes(b"x" * 20_000_000 + b"\neins\tone\n")
    tracemalloc.start()
    records = list(read_source(TsvSource(format="tsv", path=Path("t.tsv")), make_context()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000
    assert [type(record) for record in records] == [BadRow, Pair]


def test_a_line_of_exactly_the_limit_is_read(tmp_path: Path, make_context: MakeContext) -> None:
    line = b"x" * 50 + b"\t" + b"y" * 49
    for ending in (b"\n", b"\r\n", b""):
        records = read_bytes(tmp_path, line + ending, make_context(max_line_bytes=100))
        assert [type(record) for record in records] == [Pair]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"")), max_size=8))
def test_any_bytes_give_one_record_a_line(tmp_path: Path, make_context: MakeContext, lines: list[bytes]) -> None:
    data = b"".join(line + b"\n" for line in lines)
    records = read_bytes(tmp_path, data, make_context())
    assert len(records) == len(lines)
    (tmp_path / "t.jsonl").write_bytes(data)
    assert len(list(read_source(JsonlSource(format="jsonl", path=Path("t.jsonl")), make_context()))) == len(lines)
    for record in records:
        if isinstance(record, Pair):
            assert record.source.strip() and record.target.strip()
            (record.source + record.target).encode("utf-8")


def test_jsonl_with_dotted_keys_and_each_defect(tmp_path: Path, make_context: MakeContext) -> None:
    rows = [
        json.dumps({"translation": {"de": "eins", "en": "one"}}),
        json.dumps({"translation.de": "zwei", "translation.en": "two"}),
        "{kein JSON",
        json.dumps({"translation": {"de": "drei"}}),
        json.dumps(["eins", "one"]),
        json.dumps({"translation": {"de": 4, "en": "four"}}),
        '{"translation": {"de": "f\\ud800nf", "en": "five"}}',
        '{"translation": {"de": "s\\u0000chs", "en": "six"}}',
        "[" * 100_000,
        "",
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(rows) + "\n" + "\n", encoding="utf-8")
    source = JsonlSource(format="jsonl", path=Path("t.jsonl"), source_key="translation.de", target_key="translation.en")
    records = list(read_source(source, make_context(max_line_bytes=1_000_000)))
    assert records[:2] == [Pair("eins", "one", "t.jsonl:1"), Pair("zwei", "two", "t.jsonl:2")]
    reasons = [record.reason for record in records[2:] if isinstance(record, BadRow)]
    assert reasons == [
        "not_json",
        "missing_key",
        "missing_key",
        "not_text",
        "invalid_utf8",
        "nul_character",
        "not_json",
        "empty_line",
        "empty_line",
    ]


def test_plain_files_with_uneven_line_counts(tmp_path: Path, make_context: MakeContext) -> None:
    (tmp_path / "a.de").write_bytes(b"eins\nzw\xffei\ndrei\nvier\nf\xc3\xbcnf")
    (tmp_path / "a.en").write_bytes(b"one\ntwo\nthree\n")
    source = PlainSource(format="plain", source_path=Path("a.de"), target_path=Path("a.en"))
    records = list(read_source(source, make_context()))
    assert [record for record in records if isinstance(record, Pair)] == [
        Pair("eins", "one", "a.de:1"),
        Pair("drei", "three", "a.de:3"),
    ]
    reasons = Counter(record.reason for record in records if isinstance(record, BadRow))
    assert reasons == {"invalid_utf8": 1, "uneven_line_count": 2}


def test_a_missing_file_is_named(make_context: MakeContext) -> None:
    with pytest.raises(CorpusError, match=r"nowhere\.tsv does not exist"):
        list(read_source(TsvSource(format="tsv", path=Path("nowhere.tsv")), make_context()))


def test_a_folder_is_no_file(tmp_path: Path, make_context: MakeContext) -> None:
    (tmp_path / "t.tsv").mkdir()
    with pytest.raises(CorpusError, match=r"t\.tsv cannot be read"):
        list(read_source(TsvSource(format="tsv", path=Path("t.tsv")), make_context()))


ROWS = [
    {"translation": {"de": "eins", "en": "one"}},
    {"translation": {"de": "zwei", "en": None}},
    {"translation": {"de": "drei", "en": "three"}},
]


@pytest.fixture
def read_dataset(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Reads with the real library; what it caches of files lies in the test's folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")

    def read(path: str, **keys: str) -> list[Record]:
        return list(read_source(HuggingFaceSource(format="huggingface", path=path, **keys), make_context()))

    return read


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_huggingface_datasets_of_every_form(tmp_path: Path, read_dataset: Callable[..., Any]) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data.select([1]), "test": data}).save_to_disk(tmp_path / "splits")
    write_rows(tmp_path / "folder" / "test.jsonl", ROWS)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "tables").mkdir()
    data.to_parquet(tmp_path / "tables" / "test.parquet")
    for path, split in {
        "saved": "train",
        "splits": "test",
        "folder": "test",
        "rows.jsonl": "train",
        "tables": "test",
    }.items():
        assert read_dataset(path, split=split) == [
            Pair("eins", "one", f"{path}:{split}:0"),
            BadRow(f"{path}:{split}:1", "not_text", "'zwei' / None"),
            Pair("drei", "three", f"{path}:{split}:2"),
        ]


def test_huggingface_keys(tmp_path: Path, read_dataset: Callable[..., Any]) -> None:
    write_rows(tmp_path / "flat.jsonl", [{"q": "eins", "a": "one"}])
    assert read_dataset("flat.jsonl", source_key="q", target_key="a") == [Pair("eins", "one", "flat.jsonl:train:0")]
    (row,) = read_dataset("flat.jsonl", source_key="q")
    assert row == BadRow("flat.jsonl:train:0", "missing_key", "'translation.en' not in ['a', 'q']")


def test_huggingface_datasets_that_cannot_be_loaded(tmp_path: Path, read_dataset: Callable[..., Any]) -> None:
    import datasets

    data = datasets.Dataset.from_list(ROWS, split="train")
    data.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "splits")
    write_rows(tmp_path / "folder" / "train.jsonl", ROWS)
    (tmp_path / "empty").mkdir()
    for path, reason in {
        "saved": "it has no such split, but train",
        "splits": "it has no such split, but test, train",
        "folder": "Unknown split",
        "empty": "doesn't contain any data files",
        "somebody/pairs": "Couldn't reach",
    }.items():
        with pytest.raises(CorpusError, match=f"Hugging Face dataset {path} .* split dev.*{reason}") as caught:
            read_dataset(path, split="dev")
        assert str(caught.value).endswith("; check path, name and split, or the network")
        assert "\n" not in str(caught.value)


def test_huggingface_without_the_library(make_context: MakeContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependencyError, match=r"cvm-translator\[huggingface\]"):
        list(read_source(HuggingFaceSource(format="huggingface", path="some/pairs"), make_context()))
