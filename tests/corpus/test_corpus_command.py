"""`cvm-translator corpus build`: its tables, and one clear line and exit code 1 for every bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import polib
import pytest
import yaml

from cvm_translator.cli import main
from cvm_translator.config.schema import GettextPackage

from .conftest import make_po, make_sentences, write_tsv, write_wheel

COMMAND = ["corpus", "build", "config.yaml", "--output-dir", "run"]


class Finished(NamedTuple):
    exit_code: int
    out: str
    err: str


BuildCorpus = Callable[..., Finished]


def write_config(directory: Path, **corpus: Any) -> None:
    defaults = {"train": [{"format": "tsv", "path": "train.tsv"}], "validation_size": 20, "test_size": 30}
    (directory / "config.yaml").write_text(yaml.safe_dump({"corpus": {**defaults, **corpus}}))


@pytest.fixture
def build_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> BuildCorpus:
    """Writes the config and gives the command; the corpus is made in `run/corpus` of the test's folder."""
    monkeypatch.chdir(tmp_path)

    def build(*options: str, **corpus: Any) -> Finished:
        write_config(tmp_path, **corpus)
        return Finished(main([*COMMAND, *options]), *capsys.readouterr())

    return build


def the_error(done: Finished) -> str:
    """The one line of the error; what stands before it on standard error tells what was being done."""
    assert (done.exit_code, done.out) == (1, "")
    *told, last = done.err.splitlines()
    assert last.startswith("error: ")
    assert all(line.startswith("corpus: ") for line in told)
    return last.removeprefix("error: ")


def package_source(package: GettextPackage) -> dict[str, Any]:
    return {"train": [{"format": "gettext", "packages": [package.model_dump()]}]}


@pytest.fixture
def package(local_index: Path) -> GettextPackage:
    entries = [polib.POEntry(msgid=target, msgstr=source) for source, target in make_sentences(200)]
    return write_wheel(local_index, "textpack", {"app/locale/de/LC_MESSAGES/app.po": str(make_po(entries)).encode()})


def test_the_tables(tmp_path: Path) -> None:
    """Malformed rows within the allowed share are set aside and counted, a line of 10 MB among them."""
    sentences = make_sentences(200)
    write_tsv(tmp_path / "train.tsv", [*sentences, sentences[0], ("gleich", "gleich")])
    with open(tmp_path / "train.tsv", "ab") as stream:
        stream.write(b"kein Tabulator\nb\xffse\tbad\n" + b"x" * 10_000_000 + b"\nohne\n")
    write_config(tmp_path)
    command = [sys.executable, "-m", "cvm_translator", *COMMAND]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    tables: dict[str, dict[str, int]] = {}
    for line in done.stdout.splitlines():
        if line.startswith("  "):
            name, count = line.split()
            tables[title][name] = int(count.replace(",", ""))  # noqa: F821
        else:
            title = line
            tables[title] = {}
    assert tables == {
        "pairs": {"train": 150, "validation": 20, "test": 30, "unseen": 0},
        "dropped by": {"identical": 1, "exact_duplicate": 1},
        "quarantined for": {"no_tab": 2, "invalid_utf8": 1, "line_too_long": 1},
    }
    stored = json.loads((tmp_path / "run" / "corpus" / "filters.json").read_text(encoding="utf-8"))
    assert (stored["total"], stored["quarantine"]) == (tables["dropped by"], tables["quarantined for"])


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (None, "train.tsv does not exist: correct the path in the config"),
        (b"", "train.tsv (0 rows read): the corpus is empty"),
        (b"no tab\n", "corpus.train: 1 of 1 rows are malformed (no_tab 1), more than max_quarantine_share 0.1: see "),
        (b"\xff\tbad\n", "corpus.train: 1 of 1 rows are malformed (invalid_utf8 1), more than max_quarantine_share"),
        (b"x" * 10_000_000, "corpus.train: 1 of 1 rows are malformed (line_too_long 1), more than max_quarantine_"),
    ],
    ids=["missing", "empty", "no_tab", "invalid_utf8", "10_mb_line"],
)
def test_bad_files(tmp_path: Path, build_corpus: BuildCorpus, content: bytes | None, error: str) -> None:
    if content is not None:
        (tmp_path / "train.tsv").write_bytes(content)
    assert error in the_error(build_corpus())
    assert not (tmp_path / "run" / "corpus" / "manifest.json").exists()


def test_a_failed_build_keeps_the_corpus_that_was_there(tmp_path: Path, build_corpus: BuildCorpus) -> None:
    write_tsv(tmp_path / "train.tsv", make_sentences(200))
    assert build_corpus().exit_code == 0
    files = {path: path.read_bytes() for path in (tmp_path / "run" / "corpus").iterdir()}
    (tmp_path / "train.tsv").write_bytes(b"no tab\n")
    assert "train.tsv" in the_error(build_corpus())
    assert {path: path.read_bytes() for path in (tmp_path / "run" / "corpus").iterdir()} == files


def test_packages(tmp_path: Path, build_corpus: BuildCorpus, package: GettextPackage) -> None:
    """Once cached a package needs no network; a language that it has not, or another checksum, is refused."""
    options = ["--set", "corpus.cache_dir=cache"]
    assert build_corpus(*options, **package_source(package)).exit_code == 0
    cached = list((tmp_path / "cache" / "packages").iterdir())
    assert len(cached) == 1
    unknown = build_corpus(
        *options, "--output-dir", "other", "--set", "corpus.source_language=xx", **package_source(package)
    )
    assert the_error(unknown) == (
        "corpus: package textpack==1.0 has no gettext catalogue for language 'xx' (it has: de): drop the package or "
        "correct the languages"
    )
    altered = package.model_copy(update={"sha256": "0" * 64})
    wrong = the_error(build_corpus(*options, "--output-dir", "other", **package_source(altered)))
    assert wrong.startswith(f"corpus: textpack==1.0 has SHA-256 {package.sha256}, expected {'0' * 64}: ")
    assert list((tmp_path / "cache" / "packages").iterdir()) == cached


def test_no_network(build_corpus: BuildCorpus, package: GettextPackage, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: closed
    monkeypatch.setenv("PIP_RETRIES", "1")
    error = the_error(build_corpus(**package_source(package)))
    assert error.startswith("corpus: textpack==1.0 cannot be downloaded: no connection")
    assert "connect to a package index" in error
