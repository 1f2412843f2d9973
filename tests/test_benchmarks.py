"""Quick instances of the benchmarks that need no run: their systems compute what they are said to."""

from __future__ import annotations

import json
import os
import re
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from benchmarks import (
    batches,
    common,
    evidence,
    loss,
    scaling,
    scoring,
    step_profile,
    teacher_cache,
    training,
    validation,
)
from benchmarks.common import BenchmarkError
from benchmarks.machine import describe_machine, read_machine
from benchmarks.training_peers import Collate, check_joeynmt, run_joeynmt
from benchmarks.training_problem import Parts, Problem, Stopwatch, draw_lengths, read_problem
from cvm_translator.corpus.records import Pair
from cvm_translator.errors import MissingDependencyError
from cvm_translator.validation.preflight import check_alignment

PROBLEM = loss.Problem(tokens=40, vocabulary=60, student_dim=16, teacher_dim=24)


def test_the_naive_loss_is_ours_in_float64() -> None:
    inputs = loss.Inputs.draw(PROBLEM).head(PROBLEM.tokens, torch.float64)
    twin = inputs.head(PROBLEM.tokens, torch.float64)
    ours, naive = loss.compute_ours(inputs), loss.compute_naive(twin)
    torch.testing.assert_close(ours, naive)
    torch.autograd.backward([ours, naive])
    torch.testing.assert_close(inputs.hidden.grad, twin.hidden.grad)
    torch.testing.assert_close(inputs.matrix.grad, twin.matrix.grad)


def test_the_claims_about_the_loss_can_fail() -> None:
    good = {"peak_mib": 1.0, "seconds": 1.0, "error": 0.001}
    bad = {"peak_mib": 1.5, "seconds": 0.5, "error": 0.5}
    systems = {loss.OURS: good, loss.NAIVE: bad, "liger 64": bad}
    found = loss.check(systems)
    assert all(found.values()) and len(found) == 5
    far = {"peak_mib": 20.0, "seconds": 2.0, "error": 0.001}
    assert not any(loss.check({loss.OURS: good, loss.NAIVE: far, "liger 64": far}).values())
    assert len(loss.check({loss.OURS: good})) == 1  # what was not run is not claimed


@pytest.mark.parametrize("teacher", [None, "tiny"])
def test_our_side_of_the_training_benchmark(teacher: str | None, tmp_path: Path) -> None:
    parts = Parts.build(Problem("tiny", teacher, 100, 8, num_steps=3, num_warm_up=2))
    figures = training.run_ours(parts, tmp_path, stored=teacher_cache.TeacherStates if teacher else None)
    assert figures["tokens_per_second"] > 0 and 0 < figures["utilisation"] < 2
    assert 0.5 < figures["padding_efficiency"] <= 1
    assert ("states_seconds" in figures) == (teacher is not None)


def test_a_budget_of_tokens_pads_less(tmp_path: Path) -> None:
    parts = Parts.build(Problem("tiny", None, 100, 8, num_steps=3, num_warm_up=2, num_pairs=4000))
    (tmp_path / "counted").mkdir()
    counted = training.run_ours(parts, tmp_path / "counted")
    budgeted = training.run_ours(parts, tmp_path, is_budgeted=True)
    assert budgeted["padding_efficiency"] > max(0.95, counted["padding_efficiency"])


def test_a_corpus_that_the_steps_use_up_is_refused() -> None:
    wanted = vars(Problem("tiny", None, 100, 8, num_steps=3, num_warm_up=2))
    assert read_problem(Namespace(**wanted)).count_pairs() == 40
    assert read_problem(Namespace(**wanted | {"num_pairs": 41})).count_pairs() == 41
    with pytest.raises(BenchmarkError, match="--num-pairs 39: these steps take 40"):
        read_problem(Namespace(**wanted | {"num_pairs": 39}))


def test_the_stopwatch_leaves_the_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 101.0, 103.0, 105.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    watch = Stopwatch(num_warm_up=2)
    for num_tokens in (50, 60, 100, 180):
        watch.mark(num_tokens)
    assert watch.rate() == pytest.approx((180 - 60) / (105.0 - 101.0))


def test_targets_are_about_as_long_as_their_sources() -> None:
    sources, targets = draw_lengths(np.random.default_rng(1), 5000).T
    assert min(sources.min(), targets.min()) >= 3 and max(sources.max(), targets.max()) <= 45
    assert np.corrcoef(sources, targets)[0, 1] > 0.8
    assert np.std(targets - sources) == pytest.approx(3.0, abs=0.3)


def test_what_the_peer_pads_is_counted() -> None:
    collate = Collate()
    batch = collate([{"input_ids": [5, 6, 2], "labels": [7, 2]}, {"input_ids": [5, 2], "labels": [7, 8, 9, 2]}])
    assert batch["labels"].tolist() == [[7, 2, -100, -100], [7, 8, 9, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert (collate.num_real, collate.num_padded) == (11, 14)


def test_an_interpreter_without_joeynmt_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="name a Python interpreter"):
        check_joeynmt(tmp_path / "python")
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho \"No module named 'joeynmt'\" >&2\nexit 1\n")
    script.chmod(0o755)
    with pytest.raises(
        BenchmarkError, match=r"no Joey NMT \(No module named 'joeynmt'\): .*/python -m pip install joeynmt"
    ):
        check_joeynmt(script)


def test_joeynmt_is_given_the_same_sentences_and_sizes(tmp_path: Path) -> None:
    parts = Parts.build(Problem("tiny", None, 100, 8, num_steps=3, num_warm_up=2))
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho '{\"tokens_per_second\": 5.0}'\n")
    script.chmod(0o755)
    assert run_joeynmt(parts, tmp_path, script) == {"tokens_per_second": 5.0}
    source, target = parts.dataset[7]
    for language, ids in (("src", source), ("trg", target)):
        lines = (tmp_path / f"train.{language}").read_text().splitlines()
        assert len(lines) == 40 and lines[7].split() == [str(index) for index in ids]
    assert len((tmp_path / "vocabulary.txt").read_text().splitlines()) == 100
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert config["training"]["updates"] == 5 and config["training"]["batch_size"] == 8
    assert config["model"]["decoder"]["hidden_size"] == parts.student.config.dim


def test_a_trainer_that_was_not_run_is_in_the_table() -> None:
    figures = {"tokens_per_second": 900.0, "padding_efficiency": 0.9}
    data = {
        "machine": read_machine(),
        "problem": vars(Problem("tiny", None, 100, 8, 3, 2)),
        "num_parameters": 1,
        "num_pairs": 40,
        "threads": 1,
        "rounds": 1,
        "systems": {
            training.OURS: figures | {"tokens_per_second": 800.0},
            training.OURS_BUDGETED: figures,
            training.TUNED: figures | {"tokens_per_second": 300.0},
        },
    }
    failures = training.check(data["systems"], has_teacher=False)
    text = training.format_results(data | {"failures": failures})
    assert "| Joey NMT" in text and "not run" in text and list(failures.values()) == [[]]
    assert "| 2.67 " in text and "| 3.00 " in text  # of both our systems
    data |= {"problem": vars(DISTILLED), "systems": {training.OURS: figures, training.OURS_STORED: figures}}
    assert "Joey NMT" not in training.format_results(data | {"failures": failures})


DISTILLED = Problem("tiny", "tiny", 100, 8, num_steps=4, num_warm_up=1)


def test_stored_states_change_no_loss_beyond_bfloat16_and_wrong_ones_would(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(common, "ask_worker", lambda name, *_: json.dumps(teacher_cache.run_worker(name, DISTILLED)))
    turns = common.Turns(
        "benchmarks.teacher_cache", tuple(teacher_cache.SYSTEMS), vars(DISTILLED), options(tmp_path, 1)
    )
    data = teacher_cache.summarise(turns.ask())
    data |= {"machine": read_machine(), "problem": vars(DISTILLED), "threads": 1, "rounds": 1}
    assert 0 <= data["largest_loss_difference"] <= teacher_cache.MAX_LOSS_DIFFERENCE < data["control_loss_difference"]
    assert data["speedup"] == data["tokens_per_second"][training.OURS_STORED] / data["tokens_per_second"][training.OURS]
    slow = data | {"speedup": 1.2, "largest_loss_difference": 0.1, "control_loss_difference": 0.001}
    failures = teacher_cache.check(slow)
    assert [len(found) for found in failures.values()] == [1, 1, 1]
    assert "1.20 times" in teacher_cache.format_results(slow | {"failures": failures})


def test_a_loss_that_differs_in_any_round_is_told() -> None:
    def answer(rate: float, *losses: float) -> dict[str, Any]:
        return {"tokens_per_second": rate, "states_seconds": 1.0, "losses": losses}

    rounds = [
        {training.OURS: answer(1.0, 2.0, 4.0), training.OURS_STORED: answer(2.0, 2.0, 4.0 + 0.1 * number)}
        | {teacher_cache.CONTROL: answer(1.0, 2.0, 5.0 - 0.5 * number)}
        for number in range(2)
    ]
    data = teacher_cache.summarise(rounds)
    assert data["largest_loss_difference"] == pytest.approx(0.025) and data["control_loss_difference"] == 0.125


def options(folder: Path, num_rounds: int) -> Namespace:
    return Namespace(results=folder, rounds=num_rounds, threads=1)


def test_an_interrupted_benchmark_goes_on_with_its_next_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def ask(name: str, command: Any, environment: Any) -> str:
        asked.append(name)
        if len(asked) == 4:
            raise KeyboardInterrupt
        return json.dumps({"seconds": len(asked)})

    monkeypatch.setattr(common, "ask_worker", ask)
    turns = common.Turns("benchmarks.loss", ("a", "b"), {"tokens": 3, "teacher": None}, options(tmp_path, 3))
    with pytest.raises(KeyboardInterrupt):
        turns.measure()
    assert turns.measure() == {"a": {"seconds": 5}, "b": {"seconds": 6}}
    assert asked == ["a", "b", "a", "b", "a", "b", "a", "b"]
    monkeypatch.setattr(common, "hash_code", lambda: "changed")
    assert len(turns.ask()) == 3 and len(asked) == 14  # what other code has measured is not taken over
    turns.forget()
    turns.ask()
    assert len(asked) == 20


@pytest.mark.parametrize("program", [loss, training])
def test_peers_are_asked_for_before_anything_is_measured(program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("liger_kernel.chunked_loss", "transformers", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(common.Turns, "ask", None)
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    with pytest.raises(MissingDependencyError, match=r"cvm-translator\[peers\]"):
        program.main()


def test_a_results_section_of_a_document_is_replaced(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    text = "# Speed\n\n<!-- loss -->\nold\n<!-- /loss -->\n\nMore.\n<!-- training -->\n<!-- /training -->\n"
    document.write_text(text)
    assert evidence.replace_section(document, "loss", "# The loss\n\n| a |")
    assert evidence.replace_section(document, "loss", "# The loss\n\n| b |")
    expected = "<!-- loss -->\n\n## The loss\n\n| b |\n\n<!-- /loss -->\n"
    assert document.read_text() == text.replace("<!-- loss -->\nold\n<!-- /loss -->\n", expected)
    before = document.read_bytes()
    assert not evidence.replace_section(document, "scaling", "# Growth")
    assert document.read_bytes() == before


def test_only_the_repositorys_own_results_go_into_its_document(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "performance.md"
    document.write_text("<!-- loss -->\n<!-- /loss -->\n")
    monkeypatch.setattr(evidence, "DOCUMENT", document)
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "results")
    assert evidence.conclude(tmp_path / "elsewhere", "loss", {"failures": {}}, "# A trial") == 0
    assert "trial" not in document.read_text()
    assert evidence.conclude(tmp_path / "results", "loss", {"failures": {"a": ["b"]}}, "# The real one") == 1
    assert "## The real one" in document.read_text() and "The real one" in capsys.readouterr().out


def test_the_machine_is_described() -> None:
    text = describe_machine(read_machine("numpy", "no-such-package"))
    assert f"{len(os.sched_getaffinity(0))} cores of " in text and f", numpy {np.__version__}" in text
    assert "no-such-package not installed" in text and "GiB" in text


def test_what_another_run_is_still_writing_is_not_shared(tmp_path: Path) -> None:
    states = tmp_path / "donor" / "teacher" / "states"
    states.mkdir(parents=True)
    for name in ("a.states", "a.states.json", "b.states.part", "b.states.progress.json", "b.states.lock"):
        (states / name).write_text("x")
    common.share_folders(tmp_path / "donor", tmp_path / "arm")
    shared = tmp_path / "arm" / "teacher" / "states"
    assert {path.name for path in shared.iterdir()} == {"a.states", "a.states.json"}


def test_sentences_of_a_size_are_new_and_belong_together(tmp_path: Path) -> None:
    words = [f"{chr(97 + a)}{chr(97 + b)}{chr(97 + c)}" for a in range(12) for b in range(12) for c in range(12)]
    (tmp_path / "train.tsv").write_text("".join(f"{word}\t{word}x\tfile:1\n" for word in words))
    scaling.write_corpus(tmp_path / "train.tsv", tmp_path / "made.tsv", 2000)
    pairs = [line.split("\t") for line in (tmp_path / "made.tsv").read_text().splitlines()]
    assert len(pairs) == len({tuple(pair) for pair in pairs}) == 2000
    assert all(len(source.split()) == len(target.split()) for source, target in pairs)
    check_alignment([Pair(source, target, "made.tsv") for source, target in pairs])


def test_growth_that_is_too_much_is_told() -> None:
    figures = {"start_seconds": 5.0, "step_ms": 10.0}
    good = scaling.check({10: figures, 100: figures | {"step_ms": 10.5}})
    assert not any(good.values())
    bad = scaling.check({10: figures, 100: {"start_seconds": 40.0, "step_ms": 20.0}})
    assert list(bad.values()) == [["100 pairs: 40 s"], ["2.00 times"]]
    assert scaling.plot({"10": figures | {"trainer_mib": 900.0}}).startswith(b"\x89PNG")


def make_events(seconds: float) -> list[dict[str, Any]]:
    """Of a stage of 100 steps that tells of each, takes `seconds` a step and validates twice."""
    progress = [
        {
            "kind": "progress",
            "stage": "distil",
            "step": step,
            "steps_per_second": 1 / seconds,
            "memory_mib": 100.0 + step,
        }
        for step in range(1, 101)
    ]
    validations = [{"kind": "validation", "stage": "distil", "step": step, "seconds": 5.0} for step in (50, 100)]
    saves = [{"kind": "checkpoint", "stage": "distil", "step": step, "seconds": 0.1} for step in (50, 100)]
    return [*progress, *validations, *saves]


def test_what_a_run_spent_is_read_from_its_events() -> None:
    stage = validation.measure_stage(make_events(0.5), "distil", {"corpus": 100.0, "distil": 100.0}, last_step=80)
    assert stage["validation_share_of_stage"] == 0.1 and stage["validation_share_of_run"] == 0.05
    assert stage["checkpoint_share_of_stage"] == pytest.approx(0.002)
    assert stage["steps_per_second"] == [2.0, 2.0] and stage["memory_mib"] == [115.5, 195.5]
    failures = validation.check({"distil": stage}, 0.05)
    assert [bool(found) for found in failures.values()] == [False, False, False, True]
    with pytest.raises(validation.BenchmarkError, match="told its progress only 0 times"):
        validation.measure_stage([], "distil", {"distil": 1.0}, last_step=1)


def test_what_scores_cost_training_is_told() -> None:
    between = {"alone": 10.0, "scored": 16.0}
    arms = {name: between for name in scoring.ARMS} | {scoring.BESIDE: {"alone": 10.0, "scored": 12.0}}
    failures = scoring.check(arms)
    assert list(failures.values()) == [[]]
    slow = arms | {scoring.BESIDE: {"alone": 10.0, "scored": 13.5}}
    assert list(scoring.check(slow).values()) == [["3.5 of 6.0 s"]]
    data = {"machine": read_machine(), "run": "x", "num_steps": 50, "num_sentences": 2000, "metrics": ["bleu"]}
    text = scoring.format_results(data | {"rounds": 5, "arms": arms, "failures": failures})
    assert re.search(rf"{scoring.BESIDE} +\| 10.0 +\| 12.0 +\| 2.0 ", text)


def test_a_run_that_validated_once_has_nothing_to_score(tmp_path: Path) -> None:
    (tmp_path / "validation").mkdir()
    (tmp_path / "validation" / "step_10.hypotheses.txt").write_text("one\n")
    with pytest.raises(scoring.BenchmarkError, match="has validated 1 times: name a run with two"):
        scoring.read_spoken(tmp_path)


@pytest.mark.parametrize(
    ("operation", "group"),
    [
        ("aten::addmm", step_profile.MATRIX_PRODUCTS),
        ("mkldnn::_linear_pointwise", step_profile.MATRIX_PRODUCTS),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::_log_softmax_backward_data", "softmax"),
        ("aten::native_layer_norm_backward", "layer norm"),
        ("aten::copy_", "copies and casts"),
        ("aten::_to_copy", "copies and casts"),
        ("aten::scatter_", "gather and scatter"),
        ("aten::embedding_dense_backward", "gather and scatter"),
        ("aten::masked_fill_", step_profile.OTHER),
        ("aten::add_", step_profile.OTHER),
    ],
)
def test_operations_of_a_step_are_grouped_by_what_they_do(operation: str, group: str) -> None:
    assert step_profile.find_group(operation) == group


def test_budgets_of_tokens_hold_most_text() -> None:
    lengths = draw_lengths(np.random.default_rng(1), 4000)
    sizes = batches.measure(lengths, [8, 16])
    for figures in sizes.values():
        assert figures[batches.SHUFFLED] < figures[batches.COUNTED] < figures[batches.BUDGETED] < 1
    assert 8 * 10 < sizes["8"]["batch_tokens"] < 8 * 25
    assert list(batches.check(sizes).values()) == [[]]
    poor = {"8": sizes["8"] | {batches.BUDGETED: 0.9}}
    assert next(iter(batches.check(poor).values())) == [f"{sizes['8']['batch_tokens']} tokens: 90.0%"]
    data = {"run": "x", "num_pairs": 4000, "mean_tokens": 15.0, "sizes": sizes, "failures": batches.check(sizes)}
    assert "| 16 " in batches.format_results(data) and batches.plot(sizes).startswith(b"\x89PNG")


def test_the_padding_of_plain_batches() -> None:
    lengths = np.array([[1, 3], [3, 1], [1, 1], [1, 1], [9, 9]])  # with end marks 2, 4; 4, 2; 2, 2; 2, 2
    alone = batches.measure_shuffled(lengths, 1)
    assert alone == 1.0
    together = batches.measure_shuffled(np.array([[1, 3], [3, 1]]), 2)
    assert together == (2 + 4 + 4 + 2) / (2 * (4 + 4))
