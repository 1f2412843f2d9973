"""The corpus stage: files, counts, reuse, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polib
import pytest

from cvm_translator.config.default_corpus import DEFAULT_CORPUS
from cvm_translator.config.schema import CorpusConfig
from cvm_translator.corpus.build import CorpusSummary, build_corpus, load_split
from cvm_translator.corpus.parallel import map_in_order
from cvm_translator.corpus.splits import check_disjoint
from cvm_translator.errors import CorpusError

from .conftest import compute_keys, make_mo_bytes, make_po, make_sentences, write_tsv, write_wheel

Build = Callable[..., CorpusSummary]
TRAIN = [{"format": "tsv", "path": "train.tsv"}]
OUTPUTS = {"train.tsv", "validation.tsv", "test.tsv", "unseen.tsv", "quarantine.tsv", "filters.json"}


@pytest.fixture
def build(tmp_path: Path) -> Build:
    def run(messages: list[str] | None = None, *, seed: int = 13, rebuild: bool = False, **keys: Any) -> CorpusSummary:
        config = CorpusConfig(**{"train": TRAIN, "validation_size": 20, "test_size": 30, **keys})
        report = (messages if messages is not None else []).append
        return build_corpus(config, tmp_path / "corpus", seed=seed, base_dir=tmp_path, report=report, rebuild=rebuild)

    return run


def test_held_out_splits_share_nothing(tmp_path: Path, build: Build) -> None:
    sentences = make_sentences(400)
    write_tsv(tmp_path / "train.tsv", [*sentences, sentences[0], ("Gleich", "Gleich")])
    messages: list[str] = []
    summary = build(messages)
    assert summary.sizes == {"train": 350, "validation": 20, "test": 30, "unseen": 0}
    assert summary.filters == {"identical": 1, "exact_duplicate": 1} and not summary.reused
    assert any("dropped 1 exact duplicate" in message for message in messages)
    splits = {name: load_split(tmp_path / "corpus", name) for name in ("train", "validation", "test", "unseen")}
    check_disjoint({name: compute_keys(pairs) for name, pairs in splits.items()})
    assert {(p.source, p.target) for split in splits.values() for p in split} == set(sentences)
    assert splits["train"][0].origin.startswith("train.tsv:")
    assert {path.name for path in (tmp_path / "corpus").iterdir()} == OUTPUTS | {"manifest.json"}


def test_reused_when_nothing_changed_and_repaired_when_damaged(tmp_path: Path, build: Build) -> None:
    write_tsv(tmp_path / "train.tsv", make_sentences(200))
    first = build()
    again = build()
    assert again.reused and (again.sha256, again.sizes, again.filters) == (first.sha256, first.sizes, first.filters)
    (tmp_path / "corpus" / "test.tsv").write_text("x\ty\tz\n")
    with pytest.raises(CorpusError, match=r"test\.tsv differs from its hash"):
        load_split(tmp_path / "corpus", "test")
    messages: list[str] = []
    repaired = build(messages)
    assert not repaired.reused and repaired.sha256 == first.sha256
    assert "test.tsv" in messages[0] and "damaged" in messages[0]


def test_without_a_manifest_it_is_built_again(tmp_path: Path, build: Build) -> None:
    write_tsv(tmp_path / "train.tsv", make_sentences(200))
    first = build()
    (tmp_path / "corpus" / "manifest.json").unlink()
    (tmp_path / "corpus" / ".tmp-of-a-killed-build").mkdir()
    (tmp_path / "corpus" / ".tmp-train.tsv-of-a-killed-build").touch()
    with pytest.raises(CorpusError, match=r"no manifest\.json"):
        load_split(tmp_path / "corpus", "train")
    assert build().sha256 == first.sha256
    assert not list((tmp_path / "corpus").glob(".tmp*"))


def test_changed_inputs_are_refused_by_name(tmp_path: Path, build: Build) -> None:
    write_tsv(tmp_path / "train.tsv", make_sentences(200))
    first = build()
    before = (tmp_path / "corpus" / "train.tsv").read_bytes()
    write_tsv(tmp_path / "train.tsv", make_sentences(201))
    with pytest.raises(CorpusError, match=r"train\.tsv changed since the corpus"):
        build()
    assert (tmp_path / "corpus" / "train.tsv").read_bytes() == before
    write_tsv(tmp_path / "train.tsv", make_sentences(200))
    with pytest.raises(CorpusError, match=r"other settings or files \(test_size\)"):
        build(test_size=31)
    with pytest.raises(CorpusError, match=r"other settings or files \(seed\)"):
        build(seed=14)
    assert build(seed=14, rebuild=True).sha256 != first.sha256


def test_malformed_rows_go_to_quarantine(tmp_path: Path, build: Build) -> None:
    write_tsv(tmp_path / "train.tsv", make_sentences(200))
    with open(tmp_path / "train.tsv", "ab") as stream:
        stream.write(b"kein Tabulator\nb\xffse\tbad\nnoch einer ohne")
    summary = build()
    assert summary.quarantine == {"no_tab": 2, "invalid_utf8": 1}
    rows = (tmp_path / "corpus" / "quarantine.tsv").read_text(encoding="utf-8").splitlines()
    assert rows == [
        "origin\treason\ttext",
        "train.tsv:201\tno_tab\tkein Tabulator",
        "train.tsv:202\tinvalid_utf8\tb\N{REPLACEMENT CHARACTER}se\N{REPLACEMENT CHARACTER}bad",
        "train.tsv:203\tno_tab\tnoch einer ohne",
    ]
    filters = json.loads((tmp_path / "corpus" / "filters.json").read_text(encoding="utf-8"))
    assert filters["quarantine"] == {"no_tab": 2, "invalid_utf8": 1}
    assert filters["sources"][0]["num_read"] == 203 and filters["sources"][0]["num_kept"] == 200


def test_too_many_malformed_rows_are_refused(tmp_path: Path, build: Build) -> None:
    write_tsv(tmp_path / "train.tsv", make_sentences(80))
    with open(tmp_path / "train.tsv", "a") as stream:
        stream.write("kein Tabulator\n" * 20)
    with pytest.raises(
        CorpusError, match=r"20 of 100 rows are malformed \(no_tab 20\), more than max_quarantine_share 0.1"
    ):
        build()
    assert (tmp_path / "corpus" / "quarantine.tsv").exists()
    assert not (tmp_path / "corpus" / "manifest.json").exists()
    assert build(cleaning={"max_quarantine_share": 0.2}).quarantine == {"no_tab": 20}


def test_near_duplicates_are_counted_for_the_source_that_repeats(tmp_path: Path, build: Build) -> None:
    sentences = make_sentences(200)
    write_tsv(tmp_path / "train.tsv", sentences)
    write_tsv(tmp_path / "more.tsv", [(f"{source}!", target) for source, target in sentences[:7]] + sentences[7:10])
    summary = build(train=[*TRAIN, {"format": "tsv", "path": "more.tsv"}], seed=5)
    assert summary.filters == {"exact_duplicate": 3, "near_duplicate": 7}
    filters = json.loads((tmp_path / "corpus" / "filters.json").read_text(encoding="utf-8"))
    assert [source["dropped"] for source in filters["sources"]] == [{}, {"exact_duplicate": 3, "near_duplicate": 7}]
    assert [source["num_kept"] for source in filters["sources"]] == [200, 0]


def test_neither_chunks_nor_processes_nor_versions_change_the_bytes(
    tmp_path: Path, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    sentences = make_sentences(300)
    extra = [sentences[3], ("Gleich", "Gleich"), ("Die rote Datei FEHLT!", "The red file is missing")]
    write_tsv(tmp_path / "train.tsv", [*sentences[:200], *extra])
    rows = [json.dumps({"source": source, "target": target}) for source, target in sentences[150:280]]
    (tmp_path / "more.jsonl").write_text("\n".join(rows) + "\nkein JSON\n", encoding="utf-8")
    write_tsv(tmp_path / "unseen.tsv", [*sentences[270:300], ("Der Hund bellt laut", "The dog barks loudly")])
    sources: dict[str, Any] = {
        "train": [*TRAIN, {"format": "jsonl", "path": "more.jsonl"}],
        "unseen": [{"format": "tsv", "path": "unseen.tsv"}],
        "unseen_size": 5,
    }
    summary = build(**sources)
    assert summary.sizes == {"train": 230, "validation": 20, "test": 30, "unseen": 5}
    assert summary.filters == {
        "identical": 1,
        "exact_duplicate": 51,
        "near_duplicate": 1,
        "unseen_shared_with_train": 10,
    }
    # as it was before the corpus streamed: a run that was begun then finds its corpus again
    assert summary.sha256 == "0400dc12953c3501ff64ad2ca346993cc9b669b6f84bb3e5c97f21d79a39276f"
    started: list[int] = []

    def map_with_two(function: Any, items: Any) -> Any:
        started.append(1)
        return map_in_order(function, items, num_workers=2)

    monkeypatch.setattr("cvm_translator.corpus.pool.CHUNK_RECORDS", 50)
    monkeypatch.setattr("cvm_translator.corpus.pool.map_in_order", map_with_two)
    assert build(**sources, rebuild=True).sha256 == summary.sha256 and started
    assert not [path for path in (tmp_path / "corpus").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("content", ["", "gleich\tgleich\n"])
def test_an_empty_corpus_is_refused(tmp_path: Path, build: Build, content: str) -> None:
    (tmp_path / "train.tsv").write_text(content)
    with pytest.raises(CorpusError, match=r"corpus\.train: no clean pairs in train\.tsv .* the corpus is empty"):
        build()


def test_a_missing_file_and_too_small_a_corpus(tmp_path: Path, build: Build) -> None:
    with pytest.raises(CorpusError, match=r"train\.tsv does not exist"):
        build()
    write_tsv(tmp_path / "train.tsv", make_sentences(40))
    with pytest.raises(CorpusError, match="validation_size 20 and test_size 30 cannot be held out of 40"):
        build()


def test_explicit_lists_win_over_training(tmp_path: Path, build: Build) -> None:
    sentences = make_sentences(200)
    write_tsv(tmp_path / "train.tsv", sentences)
    write_tsv(tmp_path / "val.tsv", [*sentences[:5], ("Etwas ganz anderes", "Something else"), sentences[7]])
    write_tsv(tmp_path / "test.tsv", [sentences[7], (sentences[8][0], "Another translation of it"), ("Neu", "New")])
    write_tsv(tmp_path / "unseen.tsv", [sentences[100], ("Neu!", "Quite new"), ("Druckkopf", "Print head")])
    summary = build(
        validation=[{"format": "tsv", "path": "val.tsv"}],
        test=[{"format": "tsv", "path": "test.tsv"}],
        unseen=[{"format": "tsv", "path": "unseen.tsv"}],
    )
    assert summary.sizes == {"train": 193, "validation": 6, "test": 3, "unseen": 1}
    assert summary.filters == {
        "validation_shared_with_test": 1,
        "leaks_into_test": 2,
        "leaks_into_validation": 5,
        "unseen_shared_with_test": 1,
        "unseen_shared_with_train": 1,
    }
    check_disjoint({name: compute_keys(load_split(tmp_path / "corpus", name)) for name in summary.sizes})


@pytest.mark.network
@pytest.mark.timeout(600)
def test_the_default_corpus_downloads_and_builds(tmp_path: Path) -> None:
    config = CorpusConfig(**DEFAULT_CORPUS)
    summary = build_corpus(config, tmp_path, seed=13, base_dir=tmp_path, report=print)
    assert sum(summary.sizes.values()) > 40_000
    assert {**summary.sizes, "train": 0} == {"train": 0, "validation": 2000, "test": 2000, "unseen": 1000}


def test_sources_of_many_kinds_are_counted_each(tmp_path: Path, build: Build, local_index: Path) -> None:
    sentences = make_sentences(300)
    write_tsv(tmp_path / "train.tsv", sentences[:100])
    rows = [json.dumps({"source": source, "target": target}) for source, target in sentences[100:200]]
    (tmp_path / "more.jsonl").write_text("\n".join(rows), encoding="utf-8")
    catalogue = make_po([polib.POEntry(msgid=target, msgstr=source) for source, target in sentences[200:]])
    package = write_wheel(local_index, "textpack", {"app/locale/de/LC_MESSAGES/app.mo": make_mo_bytes(catalogue)})
    summary = build(
        train=[
            *TRAIN,
            {"format": "jsonl", "path": "more.jsonl"},
            {"format": "gettext", "packages": [package.model_dump()]},
        ],
        cache_dir=tmp_path / "cache",
    )
    assert summary.sizes["train"] == 250
    filters = json.loads((tmp_path / "corpus" / "filters.json").read_text(encoding="utf-8"))
    assert [(source["source"], source["num_kept"]) for source in filters["sources"]] == [
        ("train.tsv", 100),
        ("more.jsonl", 100),
        ("textpack==1.0", 100),
    ]
    manifest = json.loads((tmp_path / "corpus" / "manifest.json").read_text(encoding="utf-8"))
    assert set(manifest["outputs"]) == OUTPUTS and set(manifest["inputs"]["files"]) == {"train.tsv", "more.jsonl"}
