"""The machine that a benchmark ran on, as its results name it."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from typing import Any

import torch

from cvm_translator.training.device import describe_environment


def read_machine(*packages: str) -> dict[str, Any]:
    """Processor, cores, memory, load and versions: of Python, PyTorch and the packages named."""
    found = describe_environment(torch.device("cpu"))
    chosen = {key: found[key] for key in ("processor", "num_cores", "memory_mib", "native_bfloat16", "python")}
    return chosen | {
        "load": os.getloadavg()[0],
        "packages": {name: _find_version(name) for name in ("torch", *packages)},
    }


def describe_machine(machine: Mapping[str, Any]) -> str:
    """One sentence of what `read_machine` found."""
    versions = "".join(f", {name} {version}" for name, version in machine["packages"].items())
    bfloat16 = "with" if machine["native_bfloat16"] else "without"
    return (
        f"{machine['num_cores']} cores of {machine['processor']} ({bfloat16} bfloat16 products),"
        f" {machine['memory_mib'] / 1024:.0f} GiB, load {machine['load']:.1f} at the start; Python {machine['python']}"
        f"{versions}."
    )


def _find_version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
