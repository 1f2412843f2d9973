"""The quick instance of benchmarks/reliability/disk_full.py, on a real small disk mounted for one process only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common import REPOSITORY, BenchmarkError
from benchmarks.reliability import disk_full


@pytest.mark.slow
def test_a_save_that_finds_no_room_loses_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.reliability.disk_full", "--num-offsets", "6"]
    command += ["--work", str(tmp_path), "--results", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    if "lets no process have mounts" in done.stderr or "no tmpfs can be mounted" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads((tmp_path / "disk_full.json").read_text())
    assert data["num_offsets"] == 6
    assert data["num_retries"] >= 1
    assert data["needed_bytes"] > 100 * data["page_bytes"]
    assert not any(data["failures"].values())


def test_without_mounts_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_full.shutil, "which", lambda name: None)
    with pytest.raises(BenchmarkError, match="run as root"):
        disk_full.enter_namespace([])
