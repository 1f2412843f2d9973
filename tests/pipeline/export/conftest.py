"""The student of the reference run in every format, exported once, and 200 sentences it was not trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cvm_translator.models.runtimes import Runtime, RuntimeSettings, load_runtime
from cvm_translator.pipeline.export import ExportRequest, export_model


@dataclasses.dataclass
class Exports:
    """Makes each export when it is first asked for."""

    student: Path
    sentences: Path
    folder: Path
    reports: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def get(self, format_name: str, quantization: str | None = None) -> Path:
        name = f"{format_name}_{quantization}"
        if name not in self.reports:
            lines: list[str] = []
            request = ExportRequest(
                self.student, format_name, self.folder / name, quantization, sentences=self.sentences, max_drop=1.0
            )
            assert export_model(request, lines.append) == self.folder / name
            self.reports[name] = lines
        return self.folder / name

    def load(self, format_name: str, quantization: str | None = None) -> Runtime:
        return load_runtime(format_name, self.get(format_name, quantization), RuntimeSettings(num_threads=1))

    def load_native(self, number_format: str) -> Runtime:
        folder = self.student / {"float32": "float", "int8": "int8"}[number_format]
        return load_runtime("native", folder, RuntimeSettings(num_threads=1))

    def read_rows(self) -> tuple[list[str], list[str]]:
        """Sources and references."""
        rows = [line.split("\t") for line in self.sentences.read_text(encoding="utf-8").splitlines()]
        return [row[0] for row in rows], [row[1] for row in rows]


@pytest.fixture(scope="session")
def exports(whole_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    folder = tmp_path_factory.mktemp("exports")
    held_out = "".join((whole_run.folder / "corpus" / f"{name}.tsv").read_text() for name in ("validation", "test"))
    (folder / "held_out.tsv").write_text(held_out, encoding="utf-8")
    assert held_out.count("\n") == 200
    return Exports(whole_run.folder / "student", folder / "held_out.tsv", folder)
