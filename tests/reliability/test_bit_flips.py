"""The quick instance of benchmarks/reliability/bit_flips.py; and that its checks can fail."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.reliability import bit_flips
from cvm_translator.checkpoints import folder


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    return ["--num-trials", "24", "--work", str(tmp_path / "work")]


def test_no_damaged_checkpoint_is_believed(options: list[str]) -> None:
    data = bit_flips.run_benchmark(bit_flips.build_parser().parse_args(options))
    assert not any(data["failures"].values())
    assert len(data["checkpoints"]) == 4
    assert set(data["files"]) == {
        "ema.safetensors", "manifest.json", "model.safetensors", "optimizer.pt", "random.pt", "state.json",
    }  # fmt: skip
    for counts in data["counts"].values():
        assert sum(count for name, count in counts.items() if name.endswith("damaged")) == 24
    assert "holds: every damaged checkpoint is refused" in bit_flips.format_results(data)


def test_without_hashes_the_checks_fail(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that compares sizes only is found out."""
    monkeypatch.setattr(folder, "sha256_file", lambda path: folder._read_manifest(path.parent).files[path.name][1])
    data = bit_flips.run_benchmark(bit_flips.build_parser().parse_args(options))
    assert data["failures"][bit_flips.REFUSED]
    assert data["failures"][bit_flips.NEWEST]


def test_damage_is_spread_along_each_file(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(bytes(1000))
    damages = list(bit_flips.draw_damages(bit_flips.flip_bit, files, 20, random.Random(1)))
    for file in files:
        places = [next(i for i, byte in enumerate(damaged) if byte) for path, _, damaged in damages if path == file]
        assert [place // 100 for place in places] == list(range(10))
    assert all(sum(bin(byte).count("1") for byte in damaged) == 1 for _, _, damaged in damages)
