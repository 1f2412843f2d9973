"""The floors of the design: a package imports only from below, watchers start without torch, public names stay."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cvm_translator"

# Packages that a package may import besides itself. On floor 2, only those on its left.
BASE = {"errors", "config", "runs"}
MATHS = {"losses", "quantization", "metrics"}
COMPONENTS = ["corpus", "models", "checkpoints", "teachers", "validation"]
BELOW_LOOP = BASE | MATHS | {*COMPONENTS}
FACES = {"model_distillation", "validation_protocol", "advanced_quantization"}
SURROUNDINGS = {"pipeline", "observe", "daemon", "service", "serving"}
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "runs": {"errors"},
    **{name: BASE for name in MATHS},
    **{name: BASE | MATHS | {*COMPONENTS[:place]} for place, name in enumerate(COMPONENTS)},
    "training": BELOW_LOOP,
    **{name: BELOW_LOOP | {"training"} for name in SURROUNDINGS},
    **{name: BELOW_LOOP | {"training"} | SURROUNDINGS for name in ("cli", *FACES)},
    "__main__": {"cli"},
    "__init__": set(),
}

PUBLIC_NAMES = {
    "model_distillation": ["DistillationConfig", "DistillationDataset", "DistillationLoss", "ModelDistiller"],
    "validation_protocol": [
        "ValidationConfig",
        "ValidationResult",
        "TranslationQualityEvaluator",
        "DistillationValidator",
        "QualityDegradationDetector",
    ],
    "advanced_quantization": ["QuantizationType", "AdvancedQuantizer", "MemoryOptimizedQuantizer", "FourBitLinear"],
}

# What must not be loaded by a package that promises to start fast, or to be pure.
HEAVY = ("torch", "transformers", "safetensors")


def imported_modules(tree: ast.Module, module: str) -> set[str]:
    """Full names of everything that a file imports, at its top or within a function."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(module.split(".")[: -node.level]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            names |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
    return names


def violations(path: Path, text: str) -> list[str]:
    """Imports of a file that its floor does not allow, as `file: name`."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    owner = parts[1]
    if owner not in ALLOWED:
        return [f"{path}: the design has no place for {owner}"]
    allowed = ALLOWED[owner] | {owner}
    found = []
    for name in imported_modules(ast.parse(text), ".".join(parts)):
        package, _, rest = name.partition(".")
        target = rest.split(".")[0]
        is_place = (PACKAGE / target).is_dir() or (PACKAGE / f"{target}.py").is_file()
        if package == "cvm_translator" and target and is_place and target not in allowed:
            found.append(f"{path}: {name}")
        if package in HEAVY and owner in BASE | {"observe", "daemon"}:
            found.append(f"{path}: {name}")
    return found


def test_every_import_comes_from_below() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    assert [line for file in files for line in violations(file, file.read_text())] == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("config/load.py", "import torch.nn"),
        ("runs/lock.py", "def f():\n    from cvm_translator.corpus import build"),
        ("losses/distillation.py", "from cvm_translator.metrics import bleu"),
        ("corpus/build.py", "from cvm_translator import models"),
        ("models/folder.py", "import cvm_translator.checkpoints.store"),
        ("training/loop.py", "from ..pipeline import teacher"),
        ("observe/status.py", "from cvm_translator.daemon import stop"),
        ("daemon/background.py", "import torch"),
        ("somewhere/new.py", ""),
    ],
)
def test_the_walk_finds_a_violation(path: str, text: str) -> None:
    assert violations(PACKAGE / path, text) != []


IMPORT_ALL = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(getattr(package, "__path__", []), sys.argv[1] + "."):
    importlib.import_module(module.name)
sys.exit(" ".join(name for name in sys.argv[2:] if name in sys.modules) or 0)
"""


@pytest.mark.parametrize("package", ["errors", "config", "runs", "observe", "daemon", "cli"])
def test_watchers_and_doors_start_without_torch(package: str) -> None:
    command = [sys.executable, "-c", IMPORT_ALL, f"cvm_translator.{package}", *HEAVY]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("face", PUBLIC_NAMES)
def test_public_names(face: str) -> None:
    module = importlib.import_module(f"cvm_translator.{face}")
    assert sorted(module.__all__) == sorted(PUBLIC_NAMES[face])
    for name in PUBLIC_NAMES[face]:
        assert isinstance(getattr(module, name), type)


@pytest.mark.parametrize("face", PUBLIC_NAMES)
def test_a_face_is_imports_and_a_list_only(face: str) -> None:
    tree = ast.parse((PACKAGE / f"{face}.py").read_text())
    for node in tree.body[1:]:
        is_list = isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
        assert is_list or isinstance(node, ast.Import | ast.ImportFrom), ast.unparse(node)
