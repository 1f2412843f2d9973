"""Where the arithmetic runs, in which precision, and what must be equal for a resume to be bit-exact."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
from pathlib import Path
from typing import Any, Literal

import torch

from cvm_translator.config.compilers import HAS_COMPILER, HAS_TRITON
from cvm_translator.errors import ConfigError

MIN_COMPILED_STEPS = 1000
"""Fewer do not earn back the minute that compiling takes."""


def build_device(name: str) -> torch.device:
    """Resolve `auto` and refuse a device that this machine lacks."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")
    device = torch.device(name)
    num_cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= num_cuda:
        raise ConfigError(f"device {name}: this machine offers {num_cuda} CUDA devices; use device: auto or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device mps: not available on this machine; use device: auto or cpu")
    return device


def build_autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of a setting; `auto` takes bfloat16 where the hardware multiplies it natively."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bfloat16(precision, device))


def uses_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether a precision setting means bfloat16 products on this device."""
    return precision == "bfloat16" or (precision == "auto" and has_native_bfloat16(device))


def is_compiled(setting: Literal["auto"] | bool, num_iterations: int, device: torch.device) -> bool:
    """Whether a loop runs through PyTorch's compiler (`RunConfig.compile`).

    Raises ConfigError where it is asked for and cannot be had.
    """
    is_possible = HAS_TRITON if device.type == "cuda" else HAS_COMPILER
    if setting is True and not is_possible:
        raise ConfigError(
            "compile: needs a C compiler, and on a GPU Triton; install them or set compile to auto or false"
        )
    if setting == "auto":
        return is_possible and device.type == "cuda" and num_iterations >= MIN_COMPILED_STEPS
    return setting


@functools.cache
def _cpu_multiplies_bfloat16() -> bool:
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def has_native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products run on units of their own."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    if device.type != "cpu":
        return False
    return _cpu_multiplies_bfloat16()


def _cpu_flags() -> set[str]:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return set(line.split(":", 1)[1].split())
    return set()


def configure_threads(num_threads: int | None, device: torch.device, *, deterministic: bool) -> None:
    """Set the thread count, which the order of sums and so every last bit depends on."""
    torch.set_num_threads(num_threads or len(os.sched_getaffinity(0)))
    if device.type == "cuda" and deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")  # compiled kernels are then not chosen by a race


def describe_numerics(device: torch.device) -> dict[str, Any]:
    """What the last bits of a run depend on: recorded in each checkpoint and compared on resume."""
    return {
        "torch": str(torch.__version__),
        "device": device.type if device.type != "cuda" else torch.cuda.get_device_name(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "num_threads": torch.get_num_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled() if device.type == "cuda" else True,
    }


def describe_environment(device: torch.device) -> dict[str, Any]:
    """The machine and the libraries, for `environment.json` and the report."""
    packages = ["torch", "numpy", "sacrebleu", "rouge-score", "bert-score", "sentencepiece", "transformers"]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor_name(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "native_bfloat16": has_native_bfloat16(device),
        "numerics": describe_numerics(device),
        "packages": {name: _find_version(name) for name in packages},
    }


def _find_version(package: str) -> str:
    """What needs a missing package says so itself where it is needed."""
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
