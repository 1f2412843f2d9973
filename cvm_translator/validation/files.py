"""The files of a validation folder.

For each validation `step_<step>[.attempt_<n>]` there are `.hypotheses.txt` (one a line, escaped), `.statistics.npz`
(per-sentence statistics and probe masks, so that nothing is scored twice) and `.json`, which is written last: without
it the validation did not happen.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from cvm_translator.errors import RunFolderError
from cvm_translator.runs.atomic import read_json, write_bytes, write_json, write_text
from cvm_translator.validation.evaluator import QualityMeasurement

REPORT_NAME = "best_model_validation_report.txt"
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}


def escape_line(text: str) -> str:
    """One line without line breaks, reversibly: backslash, newline and carriage return are written as escapes."""
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return text


def unescape_line(line: str) -> str:
    parts = line.split("\\\\")
    return "\\".join(part.replace("\\n", "\n").replace("\\r", "\r") for part in parts)


def write_hypotheses(path: Path, hypotheses: list[str]) -> None:
    write_text(path, "".join(escape_line(hypothesis) + "\n" for hypothesis in hypotheses))


def read_hypotheses(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunFolderError(f"cannot read the hypotheses in {path} ({error}): validate again") from error
    return [unescape_line(line) for line in text.split("\n")[:-1]]


def validation_stem(step: int, attempt: int = 1) -> str:
    """`step_1000`, or `step_1000.attempt_2` after a rollback."""
    return f"step_{step}" if attempt == 1 else f"step_{step}.attempt_{attempt}"


class ValidationFiles:
    """Reads and writes one validation folder; `stem` is `teacher` or what `validation_stem` gives."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def json_path(self, stem: str) -> Path:
        return self.directory / f"{stem}.json"

    def hypotheses_path(self, stem: str) -> Path:
        return self.directory / f"{stem}.hypotheses.txt"

    def statistics_path(self, stem: str) -> Path:
        return self.directory / f"{stem}.statistics.npz"

    @property
    def report_path(self) -> Path:
        return self.directory / REPORT_NAME

    def write(self, stem: str, data: dict[str, Any], hypotheses: list[str], measurement: QualityMeasurement) -> None:
        """Write the three files of one validation, the JSON last."""
        arrays: dict[str, Any] = {f"statistics.{name}": rows for name, rows in measurement.statistics.items()}
        arrays.update({f"probes.{name}": mask for name, mask in measurement.probes.items()})
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_hypotheses(self.hypotheses_path(stem), hypotheses)
        write_bytes(self.statistics_path(stem), buffer.getvalue())
        write_json(self.json_path(stem), data)

    def read_json(self, stem: str) -> dict[str, Any] | None:
        """The record of a validation, or None if there is none."""
        path = self.json_path(stem)
        if not path.exists():
            return None
        try:
            data: dict[str, Any] = read_json(path)
        except ValueError as error:
            raise RunFolderError(f"{path} is not JSON ({error}): delete it to have it made again") from error
        return data

    def read_measurement(self, stem: str) -> QualityMeasurement:
        """A stored measurement; RunFolderError if one of its files is missing or torn."""
        data = self.read_json(stem)
        path = self.statistics_path(stem)
        if data is None:
            raise RunFolderError(f"{self.json_path(stem)} is missing: the validation it records is needed to go on")
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                loaded = {name: arrays[name] for name in arrays.files}
        except Exception as error:  # numpy and zipfile raise many kinds for a torn file
            raise RunFolderError(f"cannot read the statistics in {path} ({error})") from error
        return QualityMeasurement(
            set_sha256=data["set_sha256"],
            num_sentences=data["num_sentences"],
            scores=data["scores"],
            statistics={name[11:]: rows for name, rows in loaded.items() if name.startswith("statistics.")},
            probes={name[7:]: rows.astype(np.bool_) for name, rows in loaded.items() if name.startswith("probes.")},
            length_ratio=data["length_ratio"],
            signatures=data["signatures"],
            failures=data.get("failures", {}),
        )
