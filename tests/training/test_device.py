"""What is recorded of the machine."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from cvm_translator.training.device import describe_environment


def test_a_library_that_is_not_installed_is_recorded_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version

    def find(package: str) -> str:
        if package == "rouge-score":
            raise importlib.metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(importlib.metadata, "version", find)
    packages = describe_environment(torch.device("cpu"))["packages"]
    assert packages["rouge-score"] == "not installed"
    assert packages["torch"] == version("torch")
