"""One checkpoint folder: how it is written and what must hold before anything in it is believed.

    <name>.safetensors   tensors by name (weights, EMA)
    <name>.pt            nested state with tensors in it (optimizer, random generators)
    state.json           plain data
    manifest.json        step, attempt, is_best; size and SHA-256 of every file above; its own checksum; written last

Guarantees: `write_checkpoint` fsyncs every file and records the hash of the bytes it meant to write, not of what it
finds on the disk. Loading compares every size and hash before any file is parsed (safetensors and `torch.load` return
wrong tensors silently for most single-bit flips), and parses only safetensors, JSON and `weights_only=True`.

Refuses: state that would not come back as it was (tuples and number keys in plain data, pickled classes in torch
states), found when it is saved and not when it is needed. A folder without a valid manifest is no checkpoint.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor

from cvm_translator.errors import CheckpointError, NoRoomError
from cvm_translator.runs.atomic import fsync_directory, sha256_file, sha256_json

FORMAT = "cvm-translator checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
STATE = "state.json"

_PART_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\Z")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*\.(safetensors|pt|json)\Z")
_MAX_MANIFEST_BYTES = 1 << 20


class DiskFullError(NoRoomError, CheckpointError):
    """There was no room for a checkpoint; older ones are untouched, and the save may be tried again."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself, once verified."""

    step: int
    attempt: int
    is_best: bool
    files: dict[str, tuple[int, str]]
    """File name to size in bytes and SHA-256."""

    @property
    def num_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A verified checkpoint, all tensors on the CPU."""

    path: Path
    step: int
    attempt: int
    is_best: bool
    tensors: dict[str, dict[str, Tensor]]
    torch_states: dict[str, Any]
    plain: dict[str, Any]


# ------------------------------------------------------------------------------------------------------------ writing


class _HashingFile:
    """Write-only file that knows the size and hash of what was written, and its first error.

    torch.save turns an OSError of its file into a RuntimeError without a number, so the original is kept here.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.num_bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            self._stream.write(data)
        except OSError as error:
            self.error = self.error or error
            raise
        self._hash.update(data)
        num_bytes = memoryview(data).nbytes
        self.num_bytes += num_bytes
        return num_bytes

    def flush(self) -> None:
        self._stream.flush()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def write_checkpoint(
    folder: Path,
    step: int,
    attempt: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    torch_states: Mapping[str, Any],
    plain: Mapping[str, Any],
    is_best: bool,
) -> Manifest:
    """Write a whole checkpoint into `folder`, which must not exist, and make it durable.

    Raises DiskFullError when the disk has no room, CheckpointError for any other error of writing and for state that
    could not be loaded again. What was written until then is left to the caller to remove.
    """
    parts = _serialisers(tensors, torch_states, plain)
    files: dict[str, tuple[int, str]] = {}
    try:
        folder.mkdir(parents=True)
        for name, serialise in parts.items():
            files[name] = _write_file(folder / name, serialise)
        return _finish(folder, Manifest(step, attempt, is_best, files))
    except OSError as error:
        raise write_error(folder.parent, step, error) from error


def write_amended(folder: Path, source: Path, old: Manifest, plain: Mapping[str, Any], *, is_best: bool) -> Manifest:
    """Write into `folder`, which must not exist, a checkpoint with other plain data and the tensors of `source`.

    Tensors are hard links where the file system has them. Raises as `write_checkpoint`; nothing of `source` changes.
    """
    _require_plain(plain, "plain")
    files = dict(old.files)
    try:
        folder.mkdir(parents=True)
        for name in files.keys() - {STATE}:
            try:
                os.link(source / name, folder / name)
            except OSError:
                _write_file(folder / name, partial(_copy, source / name))
        files[STATE] = _write_file(folder / STATE, lambda stream: stream.write(_state_bytes(plain)))
        return _finish(folder, Manifest(old.step, old.attempt, is_best, files))
    except OSError as error:
        raise write_error(folder.parent, old.step, error) from error


def _finish(folder: Path, manifest: Manifest) -> Manifest:
    """Write the manifest, after all else, and make the folder durable."""
    _write_file(folder / MANIFEST, lambda stream: stream.write(_manifest_bytes(manifest)))
    fsync_directory(folder)
    return manifest


def _copy(source: Path, stream: Any) -> None:
    with open(source, "rb") as original:
        shutil.copyfileobj(original, stream, 1 << 20)


def write_error(directory: Path, step: int, error: OSError) -> CheckpointError:
    """The error to raise when a checkpoint could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFullError(
            f"no room in {directory} for the checkpoint of step {step} ({error.strerror}):"
            " free some space there; older checkpoints are untouched"
        )
    return CheckpointError(
        f"the checkpoint of step {step} could not be written to {directory} ({error}): older ones are untouched"
    )


def _write_file(path: Path, serialise: Callable[[Any], object]) -> tuple[int, str]:
    with open(path, "xb") as stream:
        hashing = _HashingFile(stream)
        try:
            serialise(hashing)
        except RuntimeError:
            if hashing.error is None:
                raise
            raise hashing.error from None
        stream.flush()
        os.fsync(stream.fileno())
    return hashing.num_bytes, hashing.hexdigest()


def _serialisers(
    tensors: Mapping[str, Mapping[str, Tensor]], torch_states: Mapping[str, Any], plain: Mapping[str, Any]
) -> dict[str, Callable[[Any], object]]:
    """File name to the function that writes it, after all of the state was found to be loadable."""
    names = [*tensors, *torch_states]
    for name in names:
        if not _PART_NAME.match(name) or names.count(name) > 1:
            raise CheckpointError(f"{name!r} is not a usable name for a part of a checkpoint")
    for name, state in torch_states.items():
        _require_loadable(state, name)
    _require_plain(plain, "plain")
    parts: dict[str, Callable[[Any], object]] = {}
    for name, group in tensors.items():
        parts[f"{name}.safetensors"] = partial(_write_safetensors, group)
    for name, state in torch_states.items():
        parts[f"{name}.pt"] = partial(torch.save, state)
    parts[STATE] = lambda stream: stream.write(_state_bytes(plain))
    return parts


def _state_bytes(plain: Mapping[str, Any]) -> bytes:
    return json.dumps(plain, indent=1).encode()


def _write_safetensors(tensors: Mapping[str, Tensor], stream: Any) -> None:
    """Tied tensors are written once per name: safetensors refuses shared storage."""
    seen: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone() if pointer in seen else tensor
        seen.add(pointer)
    stream.write(safetensors.torch.save(separate))


def _require_plain(value: Any, place: str) -> None:
    """Refuse what JSON would change on the way (tuples become lists, number keys become strings)."""
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise CheckpointError(f"{place} has the key {key!r}: keys of plain state must be strings")
            _require_plain(item, f"{place}.{key}")
    elif type(value) is list:
        for index, item in enumerate(value):
            _require_plain(item, f"{place}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise CheckpointError(f"{place} is a {type(value).__name__}: plain state holds JSON data only")


def _require_loadable(value: Any, place: str) -> None:
    """Refuse what `torch.load(weights_only=True)` would refuse."""
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _require_loadable(key, f"a key of {place}")
            _require_loadable(item, f"{place}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _require_loadable(item, f"{place}[{index}]")
    elif not isinstance(value, Tensor) and value is not None and type(value) not in (str, int, float, bool, bytes):
        raise CheckpointError(f"{place} is a {type(value).__name__}: torch states hold tensors and plain data only")


# ----------------------------------------------------------------------------------------------------------- manifest


def _manifest_bytes(manifest: Manifest) -> bytes:
    data: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "step": manifest.step,
        "attempt": manifest.attempt,
        "is_best": manifest.is_best,
        "files": {name: {"num_bytes": size, "sha256": sha} for name, (size, sha) in manifest.files.items()},
    }
    return (json.dumps(data | {"checksum": sha256_json(data)}, indent=2) + "\n").encode("utf-8")


def _read_manifest(path: Path) -> Manifest:
    """The manifest, if its bytes are exactly those that `_manifest_bytes` gives for its content."""
    try:
        with open(path / MANIFEST, "rb") as stream:
            raw = stream.read(_MAX_MANIFEST_BYTES)
    except OSError as error:
        raise CheckpointError(
            f"{path} is not a checkpoint: it has no readable {MANIFEST} ({error.strerror})"
        ) from error
    try:
        data = json.loads(raw)
        checksum = data.pop("checksum")
        manifest = Manifest(
            data["step"],
            data["attempt"],
            data["is_best"],
            {name: (entry["num_bytes"], entry["sha256"]) for name, entry in data["files"].items()},
        )
        format_and_version = data["format"], data["version"]
    except (LookupError, TypeError, AttributeError, RecursionError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} cannot be read") from error
    if checksum == sha256_json(data) and format_and_version != (FORMAT, VERSION):
        raise CheckpointError(
            f"checkpoint {path} is of another program version ({format_and_version}): this one reads {FORMAT, VERSION}"
        )
    if _manifest_bytes(manifest) != raw or not all(map(_FILE_NAME.match, manifest.files)):
        raise CheckpointError(f"checkpoint {path} is damaged: {MANIFEST} does not match its own checksum")
    return manifest


# ------------------------------------------------------------------------------------------------------------ reading


def verify_checkpoint(path: Path) -> Manifest:
    """Compare size and SHA-256 of every file with the manifest; raise CheckpointError naming the first that differs."""
    manifest = _read_manifest(path)
    for name, (num_bytes, sha256) in manifest.files.items():
        file = path / name
        try:
            actual_bytes = file.stat().st_size
            if actual_bytes != num_bytes:
                raise CheckpointError(
                    f"checkpoint {path} is damaged: {name} has {actual_bytes} bytes, its manifest says {num_bytes}"
                )
            if sha256_file(file) != sha256:
                raise CheckpointError(
                    f"checkpoint {path} is damaged: the SHA-256 of {name} is not the one of its manifest"
                )
        except OSError as error:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} cannot be read ({error.strerror})") from error
    return manifest


def load_checkpoint(path: Path) -> LoadedCheckpoint:
    """Verify a checkpoint folder, then load all of it. Only reads, so it may be used while a run is writing."""
    return load_verified(path, verify_checkpoint(path))


def read_plain(path: Path) -> dict[str, Any]:
    """The plain data alone of a checkpoint that `verify_checkpoint` has just found whole."""
    plain: dict[str, Any] = json.loads((path / STATE).read_bytes())
    return plain


def load_verified(path: Path, manifest: Manifest) -> LoadedCheckpoint:
    """Load the files of a checkpoint that `verify_checkpoint` has just found whole."""
    tensors: dict[str, dict[str, Tensor]] = {}
    torch_states: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    for name in manifest.files:
        file = path / name
        try:
            if file.suffix == ".safetensors":
                tensors[file.stem] = safetensors.torch.load_file(file)
            elif file.suffix == ".pt":
                torch_states[file.stem] = torch.load(file, map_location="cpu", weights_only=True)
            else:
                plain = json.loads(file.read_bytes())
        except pickle.UnpicklingError as error:  # torch's own words advise to unpickle it
            raise CheckpointError(f"checkpoint {path} is whole, but {name} holds more than tensors and data") from error
        except Exception as error:
            raise CheckpointError(f"checkpoint {path} is whole, but {name} cannot be loaded: {error}") from error
    return LoadedCheckpoint(
        path.resolve(), manifest.step, manifest.attempt, manifest.is_best, tensors, torch_states, plain
    )
