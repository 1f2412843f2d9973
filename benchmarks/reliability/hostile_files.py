"""Files that somebody who knows the format could pass off as a model or a checkpoint: crafted, with hashes made to fit.

Shared by `hostile_models`, which has all of them refused, and by the tests of model folders.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cvm_translator.checkpoints.folder import MANIFEST
from cvm_translator.models.folder import MAX_HEADER_BYTES, MAX_TENSORS
from cvm_translator.runs.atomic import sha256_file, sha256_json

MARK = "pwned"
"""The folder that a pickle would make where the program runs."""


class Evil:
    """Makes a folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.mkdir, (MARK,)


def zip_pickle() -> bytes:
    """What `torch.save` writes, with such a pickle in it."""
    stream = io.BytesIO()
    torch.save({"state": Evil()}, stream)
    return stream.getvalue()


def zip_bomb() -> bytes:
    """A ZIP archive a thousandth as large as what is in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(32 << 20))
    return stream.getvalue()


def frame(header: object, data: bytes = b"") -> bytes:
    """A safetensors file with this header, as JSON or as it is."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


HOSTILE_WEIGHTS: dict[str, bytes] = {
    "pickle": pickle.dumps(Evil()),
    "empty": b"",
    "short": b"\xff" * 7,
    "noise": b"\xff" * 64,
    "huge header": (1 << 40).to_bytes(8, "little") + b"{}",
    "no tensors": frame(b"{}"),
    "list": frame(b"[]"),
    "number": frame(b'{"a": 12}'),
    "not utf-8": frame(b"\xff" * 5),
    "deep": frame(b"[" * 100_000),
    "torch archive": zip_pickle(),
    "archive that unfolds": zip_bomb(),
    "oversized header": frame(b'{"a": "' + b" " * MAX_HEADER_BYTES + b'"}'),
    "too many entries": frame({f"t{n}": {} for n in range(MAX_TENSORS + 1)}),
    "web page": b"<!doctype html><html><body>404</body></html>",
}
"""Contents of a weights file, none of them weights."""

_CHANGES: tuple[dict[str, Any], ...] = (
    {"version": 2},
    {"number_format": "int3"},
    {"number_format": "int8"},
    {"vocab_size": 7},
    {"vocab_size": "many"},
    {"vocab_size": 10**15},
    {"model": None},
    {"model": {"dim": 33}},
    {"model": {"dim": 32, "num_heads": 4, "encoder_layers": 10**9}},
    {"model": {"dim": 32, "num_heads": 4, "max_length": 10**12}},
    {"files": {}},
    {"files": []},
    {"files": {"model.safetensors": 3}},
)
HOSTILE_CONFIGS = {str(changes): changes for changes in _CHANGES}
"""Changes of a good config.json."""


def edit_plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Quantization sections that do not belong to a model whose plan this is."""
    first = "encoder_layers.0.attention.qkv"
    return {
        "no plan": {},
        "a list": {"plan": [1]},
        "a number": 3,
        "empty": {"plan": {}},
        "missing": {"plan": {name: entry for name, entry in plan.items() if name != first}},
        "unknown": {"plan": {**plan, "encoder_layers.9.attention.qkv": plan[first]}},
        "evil": {"plan": {**plan, "../" * 500: plan[first]}},
        "float layer": {"plan": {**plan, first: {"kind": "float32"}}},
        "other kind": {"plan": {name: {"kind": "int8"} for name in plan}},
        "other group": {"plan": {**plan, first: {"kind": "int4", "group_size": 2}}},
        "huge group": {"plan": {name: {"kind": "int4", "group_size": 2 * 10**30} for name in plan}},
        "odd group": {"plan": {**plan, first: {"kind": "int4", "group_size": 31}}},
        "other grid": {"plan": {**plan, first: {"kind": "int4", "group_size": 16, "symmetric": False}}},
        "extra": {"plan": {**plan, first: {"kind": "int4", "group_size": 16, "code": "x"}}},
        "static": {"plan": {name: {"kind": "int8_static"} for name in plan}},
    }


def edit_header(good: bytes) -> dict[str, bytes]:
    """Weights files whose header says something else about the same data."""
    length = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + length]), good[8 + length :]
    first, second = list(header)[:2]

    def change(name: str, **entry: Any) -> bytes:
        return frame({**header, name: {**header[name], **entry}}, data)

    (begin, end), (begin_2, end_2) = header[first]["data_offsets"], header[second]["data_offsets"]
    text = json.dumps(header)
    return {
        "overlapping offsets": change(second, data_offsets=[begin_2 - 4, end_2 - 4]),
        "shared offsets": change(second, data_offsets=header[first]["data_offsets"]),
        "offsets beyond the end": change(first, data_offsets=[len(data), len(data) + end - begin]),
        "negative offsets": change(first, data_offsets=[-(end - begin), 0]),
        "offsets the wrong way": change(first, data_offsets=[end, begin]),
        "huge offsets": change(first, data_offsets=[0, 1 << 63]),
        "a hole": frame(header, bytes(8) + data),
        "more data": frame(header, data + bytes(8)),
        "less data": frame(header, data[:-4]),
        "huge shape": change(first, shape=[1 << 31, 1 << 31, 4]),
        "negative shape": change(first, shape=[-1, -1]),
        "unknown type": change(first, dtype="OBJECT"),
        "wider type": change(first, dtype="F64"),
        "an entry twice": frame(f"{text[:-1]}, {json.dumps(first)}: {json.dumps(header[second])}}}".encode(), data),
        "a path as a name": frame({**header, "../../etc/passwd": header[first]}, data),
        "code as metadata": frame({**header, "__metadata__": {"format": "pt", "code": [1, {"a": 2}]}}, data),
    }


def rewrite_config(folder: Path, **changes: object) -> None:
    """Change config.json as someone would who knows the format: hashes and checksum are made to fit."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in config["files"]:
        file = folder / name
        config["files"][name] = {"num_bytes": file.stat().st_size, "sha256": sha256_file(file)}
    config.update(changes)
    config.pop("checksum")
    config["checksum"] = sha256_json(config)
    path.write_text(json.dumps(config))


def rewrite_manifest(checkpoint: Path) -> None:
    """The same for a checkpoint."""
    path = checkpoint / MANIFEST
    data = json.loads(path.read_text())
    for name in data["files"]:
        file = checkpoint / name
        data["files"][name] = {"num_bytes": file.stat().st_size, "sha256": sha256_file(file)}
    data.pop("checksum")
    path.write_text(json.dumps(data | {"checksum": sha256_json(data)}, indent=2) + "\n")
