"""Where a model folder lies: in which run, beside which other folders, and whether its place is free."""

from __future__ import annotations

import os
from pathlib import Path

from cvm_translator.errors import ModelError
from cvm_translator.models.description import CONFIG_FILE
from cvm_translator.runs.layout import RunLayout


def find_run(model: Path) -> RunLayout | None:
    """The run folder in which a model folder lies (`RUN/student`, `RUN/student/float`, `RUN/teacher/model`), if any."""
    for folder in (model, *model.absolute().parents[:2]):
        layout = RunLayout(folder)
        if layout.config.is_file() and (layout.corpus / "manifest.json").is_file():
            return layout
    return None


def find_float_folder(path: Path) -> Path:
    """The folder itself, or the `float` one in a run's `student` folder."""
    is_student = not (path / CONFIG_FILE).is_file() and (path / "float" / CONFIG_FILE).is_file()
    return path / "float" if is_student else path


def find_float_beside(model: Path) -> Path | None:
    """The float student of the run in whose `student` folder a model lies, if it is there."""
    run = find_run(model)
    if run is None or model.absolute().parent != run.student.absolute():
        return None
    folder = run.student / "float"
    return folder if (folder / CONFIG_FILE).is_file() else None


def refuse_existing(output: Path) -> None:
    """Raise ModelError where there is something already: nothing is ever overwritten."""
    if os.path.lexists(output):
        raise ModelError(f"{output} exists already: remove it or choose another folder")
