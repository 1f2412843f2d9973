"""The quantisation benchmark without a run: what it refuses and keeps, what it compares, how its demands fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import evidence, quantization, quantization_plot, quantization_rows, quantization_table
from benchmarks.common import BenchmarkError
from benchmarks.quantization_rows import FLOAT, INT8, MIXED, QAT4, UNIFORM, UNIFORM_ZEROS, Lineup, name_grid
from cvm_translator.corpus.records import Pair
from cvm_translator.metrics import MetricOptions, build_metrics
from cvm_translator.metrics.resampling import paired_bootstrap, resampling_counts
from cvm_translator.models.description import FORMAT, VERSION, build_empty_model, load_model_config
from cvm_translator.pipeline.quantizing import QuantizeRequest
from cvm_translator.quantization import LayerFormat, convert_with_plan, count_bytes, find_plan, name_plan, plan_to_plain
from cvm_translator.runs import atomic

ROUNDED = name_grid(UNIFORM)
LINEUP = Lineup((UNIFORM, UNIFORM_ZEROS), ROUNDED, ((MIXED, ROUNDED),))
MACHINE = {"processor": "abacus", "num_cores": 2, "torch": "2.0"}
TINY = {"dim": 64, "num_heads": 2, "feed_forward_dim": 128, "encoder_layers": 1, "decoder_layers": 1, "max_length": 32}


def write_model(folder: Path, weights: str, plan: dict[str, LayerFormat] | None = None, method: str = "qat") -> Path:
    """A model folder without tensors."""
    plan = plan or {}
    config: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "number_format": name_plan(plan),
        "model": TINY,
        "vocab_size": 500,
        "metadata": {"quantization": {"method": method}},
        "files": {},
    }
    if plan:
        config["quantization"] = {"plan": plan_to_plain(plan)}
    atomic.write_json(folder / "config.json", config | {"checksum": atomic.sha256_json(config)})
    atomic.write_text(folder / "model.safetensors", weights)
    return folder


def write_run(run: Path, kind: str = "float", test_set: str = "ja\tyes\n", grid: LayerFormat = UNIFORM) -> Path:
    """A finished run with one student, whose weights are the run's name."""
    write_model(run / "student" / kind, run.name, {"a": grid} if kind == "int4" else None)
    atomic.write_text(run / "corpus" / "test.tsv", test_set)
    return run


# ------------------------------------------------------------------------------------------------------------- the rows


def test_runs_that_cannot_be_compared_are_refused(tmp_path: Path) -> None:
    one, two = (write_run(tmp_path / name) for name in ("one", "two"))
    trained = write_run(tmp_path / "trained", "int4")
    with pytest.raises(BenchmarkError, match="--qat4 names 1 runs and --run 2"):
        quantization_rows.open_students([one, two], [trained], tmp_path)
    with pytest.raises(BenchmarkError, match="hold the same model"):
        quantization_rows.open_students([one, two, one], [], tmp_path)
    with pytest.raises(BenchmarkError, match="unfinished/student/float holds no model"):
        quantization_rows.open_students([tmp_path / "unfinished"], [], tmp_path)
    with pytest.raises(BenchmarkError, match="two/student/int4 holds no model"):
        quantization_rows.open_students([one], [two], tmp_path)
    other = write_run(tmp_path / "other", "int4", test_set="nein\tno\n")
    with pytest.raises(BenchmarkError, match="other has another test set"):
        quantization_rows.open_students([one], [other], tmp_path)
    students = quantization_rows.open_students([one, two], [], tmp_path / "work")
    digest = atomic.sha256_file(one / "student" / "float" / "model.safetensors")
    assert students[0].work == tmp_path / "work" / digest[:16] != students[1].work


def test_the_grid_of_training_is_read_from_the_model(tmp_path: Path) -> None:
    grid = LayerFormat("int4", 32, symmetric=False)
    trained = write_model(tmp_path / "trained", "", {"a": grid, "b": grid})
    assert quantization_rows.find_grid(trained) == grid
    for name, plan in {
        "int8": {"a": LayerFormat("int8")},
        "grids": {"a": grid, "b": UNIFORM},
        "mixed": {"a": grid, "b": LayerFormat("int8")},
    }.items():
        with pytest.raises(BenchmarkError, match="--qat4 needs runs with all layers on one 4-bit grid"):
            quantization_rows.find_grid(write_model(tmp_path / name, "", plan))
    with pytest.raises(BenchmarkError, match="rounded after training"):
        quantization_rows.find_grid(write_model(tmp_path / "rounded", "", {"a": grid}, method="weight_only"))


def test_opponents_come_nearest_to_the_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization_rows, "OPPONENT_GROUPS", (12, 16, 24, 32))
    folder = write_model(tmp_path, "")
    empty = build_empty_model(load_model_config(folder), folder)

    def count(grid: LayerFormat) -> int:
        return count_bytes(convert_with_plan(empty, dict.fromkeys(find_plan(empty), grid)))

    target = count(LayerFormat("int4", 16)) + 10
    found = quantization_rows.find_opponents(folder, target)
    assert found == [LayerFormat("int4", 16), LayerFormat("int4", 24, symmetric=False)]
    larger = int(1.03 * count(found[1]))
    above = quantization_rows.find_opponents(folder, larger)  # both are more than 2 % smaller than that
    assert above == [LayerFormat("int4", 12), LayerFormat("int4", 16, symmetric=False)]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[QuantizeRequest]:
    """The requests for quantised models, which come to be at once: ten bytes a bit, twenty for zero points."""
    requests: list[QuantizeRequest] = []

    def quantize(request: QuantizeRequest, *_: Any, **__: Any) -> None:
        requests.append(request)
        settings = request.settings
        write_model(request.output, "w" * 10 * (settings.bits + 2 * (not settings.symmetric)))

    monkeypatch.setattr(quantization_rows, "quantize_folder", quantize)
    opponents = [LayerFormat("int4", 14), LayerFormat("int4", 20, symmetric=False)]
    monkeypatch.setattr(quantization_rows, "find_opponents", lambda *_: opponents)
    return requests


def test_every_run_has_the_rows_of_the_lineup(tmp_path: Path, made: list[QuantizeRequest]) -> None:
    grid = LayerFormat("int4", 48, symmetric=False)
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    trained = [write_run(tmp_path / name, "int4", grid=grid) for name in ("three", "four")]
    own = write_model(runs[0] / "student" / "int8", "eight", {"a": LayerFormat("int8")})
    students = quantization_rows.open_students(runs, trained, tmp_path / "work")
    lineup = quantization_rows.build_lineup(students)
    assert lineup.rounded == "weight-only 4, groups of 48, zero points"
    assert lineup.equal_bytes == (
        (MIXED, "weight-only 4, groups of 14"),
        (MIXED, "weight-only 4, groups of 20, zero points"),
        ("mixed, the bytes of uniform 4", ROUNDED),
        ("mixed, the bytes of uniform 4 with zero points", name_grid(UNIFORM_ZEROS)),
    )
    first, second = (quantization_rows.build_folders(student, lineup) for student in students)
    assert list(first) == list(second) and {lineup.rounded, *sum(lineup.equal_bytes, ())} <= first.keys()
    assert first[FLOAT] == runs[0] / "student" / "float" and first[QAT4] == trained[0] / "student" / "int4"
    assert first[INT8] == own and second[INT8].parent == students[1].work
    targets = [request.settings.target_megabytes for request in made if request.settings.target_megabytes]
    assert targets == [40 / 1e6, 60 / 1e6] * 2

    num_made = len(made)
    quantization_rows.build_folders(students[0], lineup)
    assert len(made) == num_made
    atomic.write_text(students[0].model / "model.safetensors", "trained anew")
    (again, _) = quantization_rows.open_students(runs, trained, tmp_path / "work")
    assert quantization_rows.build_folders(again, lineup)[MIXED] != first[MIXED] and len(made) > num_made


def test_students_trained_on_different_grids_are_refused(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    trained = [write_run(tmp_path / str(size), "int4", grid=LayerFormat("int4", size)) for size in (32, 64)]
    students = quantization_rows.open_students(runs, trained, tmp_path / "work")
    with pytest.raises(BenchmarkError, match="different grids"):
        quantization_rows.build_lineup(students)


# ----------------------------------------------------------------------------------------------------------- measuring


class Meter:
    """Stands in for the fresh process; `fail_at` is the call that breaks."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.num_calls, self.fail_at = 0, fail_at

    def __call__(self, *_: Any, num_threads: int, **__: Any) -> dict[str, Any]:
        self.num_calls += 1
        if self.num_calls == self.fail_at:
            raise KeyboardInterrupt
        return {"tokens_per_second": float(self.num_calls), "num_threads": num_threads}


def test_what_was_measured_is_measured_again_when_what_it_is_of_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meter = Meter()
    monkeypatch.setattr(quantization, "measure_folder", meter)
    (student,) = quantization_rows.open_students([write_run(tmp_path / "run")], [], tmp_path / "work")
    folders = {FLOAT: student.model}
    for num_calls, change in enumerate(
        (
            lambda: None,
            lambda: atomic.write_text(student.model / "model.safetensors", "other weights"),
            lambda: atomic.write_text(student.run.corpus / "test.tsv", "nein\tno\n"),
        ),
        start=1,
    ):
        change()
        for _ in range(2):
            quantization.measure_quality(folders, student, num_threads=1)
            assert meter.num_calls == num_calls
    quantization.measure_quality(folders, student, num_threads=2)
    assert meter.num_calls == 4


def test_rounds_are_kept_whole_and_only_for_what_they_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meter = Meter(fail_at=11)
    monkeypatch.setattr(quantization, "measure_folder", meter)
    monkeypatch.setattr(quantization, "load_split", lambda *_: [Pair("ja", "yes", "file")])
    (student,) = quantization_rows.open_students([write_run(tmp_path / "run")], [], tmp_path / "work")
    folders = {FLOAT: student.model, MIXED: write_model(tmp_path / "mixed", "mixed")}

    def measure(num_rounds: int, num_threads: int = 1) -> list[Any]:
        return quantization.measure_speed(folders, student, num_threads, num_rounds, MACHINE)

    assert measure(0) == [] and meter.num_calls == 0
    with pytest.raises(KeyboardInterrupt):  # in the second round
        measure(2)
    rounds = measure(2)
    assert [sorted(one) for one in rounds] == [sorted(folders)] * 2 and meter.num_calls == 6 + 5 + 6
    assert rounds[0][MIXED] == {"1": 4.0, "32": 5.0, "128": 6.0} and rounds[1][FLOAT]["1"] == 12.0
    assert measure(1) == rounds[:1] and measure(0) == [] and meter.num_calls == 17
    assert quantization_table.find_medians(rounds)[MIXED]["1"] == (4.0 + 15.0) / 2
    assert quantization_table.find_medians([]) == {}
    assert measure(1, num_threads=2) != rounds[:1]
    atomic.write_text(folders[MIXED] / "model.safetensors", "mixed anew")
    assert measure(1) != rounds[:1]


def test_the_machine_is_read_now() -> None:
    machine = quantization.describe_machine()
    assert machine["processor"] and machine["num_cores"] > 0 and machine["torch"][0].isdigit()


# ----------------------------------------------------------------------------------------------------------- the table


PAIRS = [Pair(f"Satz {n}", " ".join(f"w{(n * 7 + k) % 50}" for k in range(12)), "file") for n in range(60)]
BYTES = {FLOAT: 1000, INT8: 260, ROUNDED: 138, name_grid(UNIFORM_ZEROS): 142, MIXED: 137, QAT4: 139}


def spoil(share: float, seed: int) -> list[str]:
    """The references with a share of their words wrong."""
    generator = np.random.default_rng(seed)
    return [" ".join(w if generator.random() > share else "x" for w in pair.target.split()) for pair in PAIRS]


def measure_rows(seed: int, qat4: float = 0.12) -> dict[str, dict[str, Any]]:
    shares = {FLOAT: 0.05, INT8: 0.05, ROUNDED: 0.25, name_grid(UNIFORM_ZEROS): 0.2, MIXED: 0.1, QAT4: qat4}
    return {
        name: {
            "hypotheses": {"test": spoil(share, seed)},
            "num_bytes": BYTES[name] + seed,
            "peak_memory_mib": 300.0 + seed,
            "baseline_memory_mib": 100.0,
        }
        for name, share in shares.items()
    }


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(evidence, "NUM_DRAWS", 500)
    return quantization_table.compare([measure_rows(seed) for seed in range(3)], PAIRS, "en", LINEUP)


def test_comparisons_are_the_paired_bootstraps_and_pooled_over_runs(compared: dict[str, Any]) -> None:
    (bleu,) = build_metrics(["bleu"], MetricOptions(target_language="en"))
    references = [pair.target for pair in PAIRS]
    summed = {
        name: np.sum(
            [bleu.statistics(measure_rows(seed)[name]["hypotheses"]["test"], references) for seed in range(3)], axis=0
        )
        for name in BYTES
    }
    counts = resampling_counts(len(PAIRS), 500, evidence.DRAWS_SEED)
    for name, other, found in (
        (QAT4, FLOAT, compared["rows"][QAT4]["against_float"]["bleu"]),
        (QAT4, ROUNDED, compared["recovery"]["gained"]),
        (MIXED, ROUNDED, compared["equal_bytes"][0]["bleu"]),
    ):
        expected = paired_bootstrap(bleu, summed[other], summed[name], counts)
        assert found == pytest.approx(evidence.plain_comparisons({"bleu": expected})["bleu"])
    assert compared["rows"][MIXED]["num_bytes"] == 139 and compared["rows"][MIXED]["memory_mib"] == 202.0
    assert compared["equal_bytes"][0]["byte_ratio"] == 139 / 140


def test_what_training_recovers_is_a_share_with_an_interval(compared: dict[str, Any]) -> None:
    recovery = compared["recovery"]
    gained, lost = recovery["gained"]["difference"], recovery["lost"]["difference"]
    assert recovery["share"] == pytest.approx(gained / lost) and 0.5 < recovery["share"] < 0.9
    assert recovery["share_interval"][0] < recovery["share"] < recovery["share_interval"][1]
    assert recovery["beyond_half"]["difference"] == pytest.approx(gained - lost / 2)
    assert (recovery["beyond_half"]["low"] > 0) == (recovery["share_interval"][0] > 0.5)
    assert len(recovery["by_run"]) == 3


def test_no_share_is_told_of_a_loss_that_may_be_none() -> None:
    draws = np.linspace(-1.0, 1.0, 100)
    scored = {
        name: quantization_table.Scored(score, [score], score + sign * draws)
        for name, score, sign in ((FLOAT, 40.0, 1), (ROUNDED, 39.9, -1), (QAT4, 40.0, 1))
    }
    recovery = quantization_table.compute_recovery(scored, ROUNDED)
    assert recovery["share_interval"] is None
    failures = quantization_table.find_failures(make_data({"recovery": recovery}))
    assert ["rounding loses only 0.10 BLEU: train on a coarser grid"] in failures.values()


def make_data(changes: dict[str, Any]) -> dict[str, Any]:
    """Figures with which all demands hold, but for `changes`."""
    figures = {"difference": -0.2, "low": -0.4, "high": 0.0, "p_value": 0.04}
    row = {"scores": {"bleu": 39.0}, "against_float": {"bleu": figures, "chrf": figures}, "memory_mib": 200.0}
    recovery = {
        "rounded": ROUNDED,
        "lost": figures | {"difference": 2.0},
        "gained": figures | {"difference": 1.5, "low": 1.0},
        "beyond_half": figures | {"difference": 0.5, "low": 0.1},
        "share": 0.75,
        "share_interval": [0.6, 0.9],
        "by_run": [{"lost": 2.0, "gained": 1.5}],
    }
    data: dict[str, Any] = {
        "runs": ["one", "two", "three"],
        "runs_at_4_bits": ["four", "five", "six"],
        "num_sentences": 60,
        "num_threads": 1,
        "machine": MACHINE,
        "rows": {name: row | {"num_bytes": size, "byte_share": size / 1000} for name, size in BYTES.items()},
        "recovery": recovery,
        "equal_bytes": [
            {"mixed": MIXED, "uniform": ROUNDED, "byte_ratio": 0.99, "bleu": figures, "chrf": figures},
        ],
        "speed_rounds": [],
        "speeds": {},
    }
    data["rows"][FLOAT]["against_float"] = {}
    data["rows"] |= changes.pop("rows", {})
    return data | changes


def test_the_demands_hold_and_each_can_fail() -> None:
    assert not any(quantization_table.find_failures(make_data({})).values())
    good = make_data({})
    lossy = {"against_float": {"bleu": {"difference": -1.01}}}
    bad = {
        f"{INT8}: at most 0.3": {"rows": {INT8: good["rows"][INT8] | lossy}},
        f"{QAT4}: at most 1 BLEU": {"rows": {QAT4: good["rows"][QAT4] | lossy}},
        "the 95 % interval of the gain": {
            "recovery": good["recovery"] | {"gained": good["recovery"]["gained"] | {"low": -0.1}}
        },
        "at least half": {"recovery": good["recovery"] | {"share": 0.4, "beyond_half": {"difference": -0.2}}},
        "of at least 3 runs": {"runs": ["one", "two"]},
        "8 bits: at most 0.27": {"rows": {INT8: good["rows"][INT8] | {"byte_share": 0.271}}},
        "4 bits in groups of 64": {"rows": {QAT4: good["rows"][QAT4] | {"byte_share": 0.143}}},
    }
    for words, change in bad.items():
        (failed,) = [check for check, found in quantization_table.find_failures(make_data(change)).items() if found]
        assert words in failed


def test_what_was_not_trained_at_4_bits_is_not_shown() -> None:
    data = make_data({"recovery": None})
    del data["rows"][QAT4]
    failures = quantization_table.find_failures(data)
    assert list(failures.values()).count([quantization_table.NOT_MEASURED]) == 3
    assert "rounded to the same grid\n" not in quantization_table.format_results(data | {"failures": failures})


def test_results_have_every_column_and_say_what_holds(compared: dict[str, Any]) -> None:
    data = make_data({}) | compared
    data["failures"] = quantization_table.find_failures(data)
    text = quantization_table.format_results(data)
    header, _, *rows = [line for line in text.splitlines() if line.startswith("|")][: 2 + len(BYTES)]
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert columns[:6] == ["method", "bytes", "of float32", "BLEU", "BLEU against float", "chrF against float"]
    assert columns[6:] == [f"tokens/s, batch {size}" for size in (1, 32, 128)] + ["peak memory, MiB"]
    assert [cell.strip() for cell in rows[0].strip("|").split("|")][4:] == ["-"] * 5 + ["202"]
    assert "1 of 2 cores of abacus, torch 2.0, not timed (-)" in text
    assert "## Mixed against uniform at equal bytes" in text and "mixed is better" in text
    assert "- FAILED: dynamic 8" not in text and "- FAILED: trained at 4 bits: at most 1 BLEU" in text
    assert "more than half is shown" in text

    rounds = [{name: {"1": 600.0, "32": 3000.0, "128": 8000.0} for name in BYTES}] * 2
    data |= {"speed_rounds": rounds, "speeds": quantization_table.find_medians(rounds)}
    text = quantization_table.format_results(data)
    assert "medians of 2 rounds" in text and "| 600 " in text


@pytest.mark.parametrize(
    ("difference", "p_value", "expected"),
    [(0.5, 0.01, "mixed is better"), (-0.5, 0.01, "uniform is better"), (0.5, 0.05, "no difference shown")],
)
def test_whether_mixed_wins_is_told_either_way(difference: float, p_value: float, expected: str) -> None:
    assert quantization_table.describe_winner({"difference": difference, "p_value": p_value}) == expected


def test_labels_of_one_column_keep_their_distance() -> None:
    points = [(1.0, 37.0, "a"), (1.2, 37.01, "b"), (1.1, 38.0, "c"), (4.0, 37.0, "d")]
    places = quantization_plot.place_labels(points, line_height=0.1)
    assert places["a"] == (1.07 * 1.2, 37.0) and places["b"] == (1.07 * 1.2, 37.1) and places["c"][1] == 38.0
    assert places["d"] == (1.07 * 4.0, 37.0)
