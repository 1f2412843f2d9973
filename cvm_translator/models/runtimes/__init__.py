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

__all__ = ["RUNTIMES", "Runtime", "RuntimeSettings", "import_runtime", "load_runtime"]


def _native() -> type[Runtime]:
    from cvm_translator.models.runtimes.native import NativeRuntime

    return NativeRuntime


def _huggingface() -> type[Runtime]:
    from cvm_translator.models.runtimes.huggingface import HuggingFaceRuntime

    return HuggingFaceRuntime


def _ctranslate2() -> type[Runtime]:
    from cvm_translator.models.runtimes.ctranslate2 import Ctranslate2Runtime

    return Ctranslate2Runtime


def _argos() -> type[Runtime]:
    from cvm_translator.models.runtimes.ctranslate2 import ArgosRuntime

    return ArgosRuntime


def _onnx() -> type[Runtime]:
    from cvm_translator.models.runtimes.onnx import OnnxRuntime

    return OnnxRuntime


RUNTIMES: dict[str, Callable[[], type[Runtime]]] = {
    "native": _native,
    "huggingface": _huggingface,
    "ctranslate2": _ctranslate2,
    "argos": _argos,
    "onnx": _onnx,
}


def import_runtime(name: str) -> type[Runtime]:
    """The runtime of this name, imported; an unknown name is a ModelError."""
    if name not in RUNTIMES:
        raise ModelError(f"unknown runtime {name!r}: known are {', '.join(RUNTIMES)}")
    return RUNTIMES[name]()


def load_runtime(name: str, path: Path | str, settings: RuntimeSettings | None = None) -> Runtime:
    """The model at `path`; raises ModelError if it cannot be loaded, MissingDependencyError without its library."""
    settings = settings or RuntimeSettings()
    if name != "native" and settings.precision != "float32":
        raise ModelError(f"--precision {settings.precision} is for --runtime native: {name} computes as exported")
    return import_runtime(name)(Path(path), settings)
