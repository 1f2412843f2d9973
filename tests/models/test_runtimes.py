"""What the runtimes share: the use of the machine, and what is said where there is no export."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cvm_translator.errors import ModelError
from cvm_translator.models.runtimes import RuntimeSettings
from cvm_translator.models.runtimes.base import load_export_facts
from cvm_translator.models.runtimes.ctranslate2 import Ctranslate2Runtime, arrange


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (RuntimeSettings(), (3, 1)),
        (RuntimeSettings(num_threads=2), (1, 2)),
        (RuntimeSettings(num_workers=2), (2, 0)),
        (RuntimeSettings(num_threads=1, num_workers=3), (3, 1)),
    ],
)
def test_ctranslate2_decodes_a_batch_on_every_core_unless_told_otherwise(
    settings: RuntimeSettings, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 5})
    assert arrange(settings) == expected


def test_without_an_export_the_command_that_makes_it_is_named(tmp_path: Path) -> None:
    student = tmp_path / "run" / "student"
    student.mkdir(parents=True)
    command = f"cvm-translator export --model {student} --format ctranslate2 --output {student / 'ctranslate2'}"
    for folder in (student, tmp_path / "run"):
        with pytest.raises(ModelError, match=re.escape(command)):
            Ctranslate2Runtime(folder, RuntimeSettings())
    with pytest.raises(ModelError, match=re.escape(f"--format onnx --output {student / 'onnx'}, and name that folder")):
        load_export_facts(student, "onnx")
