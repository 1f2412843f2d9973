"""The libraries that run a model, behind one face: lines of text in, as many lines out.

`native` reads this program's own folders; the others read what `cvm-translator export` wrote for them. Whatever the
runtime, empty lines stay empty, long lines are cut in the same places and outputs end at the same length, so that what
differs between two runtimes is their arithmetic alone.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cvm_translator.errors import ModelError
from cvm_translator.models.runtimes.base import Runtime, RuntimeSettings

__all__ = ["RUNTIMES", "Runtime", "RuntimeSettings", "load_runtime"]


def _load_native(path: Path, settings: RuntimeSettings) -> Runtime:
    from cvm_translator.models.runtimes.native import NativeRuntime

    return NativeRuntime(path, settings)


def _load_ctranslate2(path: Path, settings: RuntimeSettings) -> Runtime:
    from cvm_translator.models.runtimes.ctranslate2 import Ctranslate2Runtime

    return Ctranslate2Runtime(path, settings)


def _load_argos(path: Path, settings: RuntimeSettings) -> Runtime:
    from cvm_translator.models.runtimes.ctranslate2 import ArgosRuntime

    return ArgosRuntime(path, settings)


def _load_huggingface(path: Path, settings: RuntimeSettings) -> Runtime:
    from cvm_translator.models.runtimes.huggingface import HuggingFaceRuntime

    return HuggingFaceRuntime(path, settings)


def _load_onnx(path: Path, settings: RuntimeSettings) -> Runtime:
    from cvm_translator.models.runtimes.onnx import OnnxRuntime

    return OnnxRuntime(path, settings)


RUNTIMES: dict[str, Callable[[Path, RuntimeSettings], Runtime]] = {
    "native": _load_native,
    "huggingface": _load_huggingface,
    "ctranslate2": _load_ctranslate2,
    "argos": _load_argos,
    "onnx": _load_onnx,
}
"""Each imports its library when it is called."""


def load_runtime(name: str, path: Path | str, settings: RuntimeSettings | None = None) -> Runtime:
    """The model at `path` in the runtime of this name; raises ModelError where it cannot be loaded."""
    if name not in RUNTIMES:
        raise ModelError(f"unknown runtime {name!r}: known are {', '.join(RUNTIMES)}")
    return RUNTIMES[name](Path(path), settings or RuntimeSettings())
