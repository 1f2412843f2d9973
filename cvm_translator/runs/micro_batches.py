"""How often each stage's batches are cut further than its config says, because memory ran out: `micro_batches.json`.

`{"distil": 4}` means four times the config's `grad_accum_steps`, with the same effective batch. The supervisor writes
it, every later start of the run reads it; the config stays what it was, so this is never "another config".
"""

from __future__ import annotations

from pathlib import Path

from cvm_translator.errors import RunFolderError
from cvm_translator.runs import atomic


def read_factors(path: Path) -> dict[str, int]:
    """Stage to factor; empty where memory never ran out. Raises RunFolderError for a damaged file."""
    try:
        data = atomic.read_json(path)
        if not isinstance(data, dict):
            raise ValueError("no JSON object")
        factors = {str(stage): int(factor) for stage, factor in data.items()}
        if any(factor < 1 for factor in factors.values()):
            raise ValueError("a factor below 1")
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise RunFolderError(
            f"{path} cannot be read ({error}): delete it to go on with the config's grad_accum_steps"
        ) from None
    return factors


def write_factor(path: Path, stage: str, factor: int) -> None:
    atomic.write_json(path, read_factors(path) | {stage: factor})
