"""The benchmark of runtimes: what it demands, how cores are shared, and how failures are told."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import common, decoding, decoding_results, runtime_teams
from benchmarks.common import BenchmarkError
from benchmarks.decoding_results import BFLOAT16, DEPLOYED_BATCH_SIZE, INT8, MAPPED, SYSTEMS
from benchmarks.runtime_teams import AVX512_FLAGS, Arrangement, Worker, deal_batches, find_ct2_isa, list_arrangements
from cvm_translator.models.runtimes.base import cut_batches

SIZES = [1, DEPLOYED_BATCH_SIZE]
CHANGE = {"difference": -0.05, "low": -0.1, "high": 0.0, "p_value": 0.2, "bleu": 30.0}


def make_decoding(**rates: float) -> dict[str, Any]:
    """Results in which systems decode 100 tokens a second, or what is given under their names."""
    found = {system.name: rates.get(system.name, 100.0) for system in SYSTEMS}
    return {
        "run": "my_run",
        "num_parameters": 2.5e6,
        "machine": {"processor": "P", "cores": [0, 3], "load_at_start": 0.1, "ct2_isa": "AVX512", "libraries": {}},
        "num_rounds": 5,
        "batch_sizes": SIZES,
        "num_timed": {str(size): 200 for size in SIZES},
        "num_scored": 2000,
        "rates": {
            name: {
                str(size): {"median": rate, "arrangement": "2 × 1", "trials": {"1 × 2": rate / 2, "2 × 1": rate}}
                for size in SIZES
            }
            for name, rate in found.items()
        },
        "sizes": {system.name: 2**20 for system in SYSTEMS},
        "scores": {system.name: CHANGE for system in SYSTEMS},
        "compared": {
            f"{MAPPED} against {INT8}": {str(size): CHANGE for size in SIZES},
            f"{BFLOAT16} against {decoding.FLOAT32}": {str(DEPLOYED_BATCH_SIZE): CHANGE},
        },
    }


def test_the_claims_about_decoding_can_fail() -> None:
    data = make_decoding()
    assert [len(said) for said in decoding_results.find_failures(data).values()] == [2, 2, 2, 1, 1, 0, 0]
    fast = make_decoding(**{INT8: 400.0, decoding.FLOAT32: 200.0, BFLOAT16: 300.0, MAPPED: 1000.0})
    assert not any(decoding_results.find_failures(fast).values())


def test_the_deployed_model_is_judged_at_its_batch_size() -> None:
    data = make_decoding(**{INT8: 400.0, decoding.FLOAT32: 200.0, BFLOAT16: 300.0, MAPPED: 1000.0})
    loss = data["compared"][f"{MAPPED} against {INT8}"]
    loss["1"] = CHANGE | {"difference": -0.5}
    data["rates"][MAPPED]["1"]["median"] = 410.0
    assert not any(decoding_results.find_failures(data).values())
    text = decoding_results.format_results(data)
    assert "(1.02×: no)" in text and "2.50×: yes" in text and "(-0.50 [-0.10, +0.00]: no)" in text
    loss[str(DEPLOYED_BATCH_SIZE)] = CHANGE | {"difference": -0.5}
    assert sum(map(len, decoding_results.find_failures(data).values())) == 1
    del loss[str(DEPLOYED_BATCH_SIZE)]
    assert [f"batch {DEPLOYED_BATCH_SIZE}: not measured"] in decoding_results.find_failures(data).values()


def test_the_table_says_where_and_how_it_was_measured() -> None:
    data = make_decoding()
    text = decoding_results.format_results(data)
    assert "2 cores (numbers 0, 3)" in text and "CT2_FORCE_CPU_ISA=AVX512" in text and "50 / **100**" in text
    assert f"in batches of {DEPLOYED_BATCH_SIZE} (the default of cvm-translator translate for CTranslate2)" in text
    data["machine"]["ct2_isa"] = None
    assert "the instruction set that it chose" in decoding_results.format_results(data)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 20])
def test_processes_side_by_side_cut_the_batches_of_one(num_processes: int) -> None:
    sources = [[place] * (1 + place * 7 % 13) for place in range(50)]

    def cut(given: list[Any]) -> list[list[Any]]:
        return [[given[i] for i in chosen] for chosen in cut_batches(given, 4)]

    hands = deal_batches(sources, 4, num_processes)
    assert len(hands) == num_processes
    assert sorted(batch for hand in hands for batch in cut(hand)) == sorted(cut(sources))


@pytest.mark.parametrize(("num_cores", "expected"), [(1, ["1 × 1"]), (2, ["1 × 2", "1 × 1", "2 × 1"])])
def test_all_are_offered_the_same_arrangements(num_cores: int, expected: list[str]) -> None:
    assert [str(found) for found in list_arrangements(num_cores)] == expected
    assert Arrangement(num_cores, 1) in list_arrangements(num_cores)


@pytest.mark.parametrize(
    ("environment", "flags", "expected"),
    [
        ({}, " ".join(sorted(AVX512_FLAGS)), "AVX512"),
        ({}, "avx2 avx512f", None),
        ({runtime_teams.CT2_ISA: "AVX2"}, " ".join(sorted(AVX512_FLAGS)), "AVX2"),
    ],
)
def test_avx512_is_forced_only_where_it_is(environment: dict[str, str], flags: str, expected: str | None) -> None:
    assert find_ct2_isa(environment, flags) == expected


def test_a_worker_that_dies_says_why() -> None:
    program = "import sys; sys.stdin.readline(); sys.exit('ModelError: it is broken')"
    worker = Worker("the system", [sys.executable, "-c", program], 1)
    worker.send(do="hold", sources=[])
    with pytest.raises(BenchmarkError, match="the system ended with exit code 1: ModelError: it is broken"):
        worker.receive()
    worker.close()


def test_cores_are_those_that_may_be_used() -> None:
    usable = sorted(os.sched_getaffinity(0))
    assert decoding.choose_cores(1) == usable[:1]
    with pytest.raises(BenchmarkError, match="--cores 100000: this process may use"):
        decoding.choose_cores(100_000)


def test_a_run_without_an_int8_student_is_refused_by_name(tmp_path: Path) -> None:
    for name in ("float", "int8"):
        with pytest.raises(BenchmarkError, match=f"has no student/{name}: name a finished run"):
            common.find_student(tmp_path)
        (tmp_path / "student" / name).mkdir(parents=True)
        (tmp_path / "student" / name / "config.json").touch()
    assert common.find_student(tmp_path).root == tmp_path
