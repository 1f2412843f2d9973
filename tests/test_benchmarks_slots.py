"""The benchmark of bounded attention on tiny models: what it measures, what its arms share, how its checks fail."""

from __future__ import annotations

from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import evidence, slots, slots_results
from benchmarks.common import Arm, BenchmarkError
from benchmarks.slots import WatchedModel
from benchmarks.slots_results import AFTERWARDS, CONTROL, JOINED, LONG, START
from cvm_translator.config.schema import ModelConfig
from cvm_translator.corpus.records import Pair
from cvm_translator.models.initialization import init_random
from cvm_translator.models.transformer import EOS_ID, CvmTransformer
from cvm_translator.runs.layout import RunLayout

CAPACITY = 3
SIZES = {"dim": 32, "num_heads": 4, "feed_forward_dim": 48, "encoder_layers": 1, "decoder_layers": 2, "max_length": 96}
BYTES_A_SLOT = 2 * 2 * (2 * 32 + 4) * 4
"""Two layers with two attentions each; keys and values of all heads, and a count of each; float32."""


class Words:
    """A tokenizer whose tokens are the words w0 … w39."""

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [[4 + int(word[1:]) for word in text.split()] for text in texts]

    def decode(self, ids: list[list[int]]) -> list[str]:
        return [" ".join(f"w{token - 4}" for token in row) for row in ids]


def build_pairs(num_pairs: int, longest: int) -> list[Pair]:
    """Pairs of 1 to `longest` words."""
    sources = [[(7 * n + k * k) % 40 for k in range(1 + n % longest)] for n in range(num_pairs)]
    texts = [" ".join(f"w{number}" for number in source) for source in sources]
    return [Pair(text, text.replace("w1", "w2"), f"file:{n}") for n, text in enumerate(texts)]


@pytest.fixture(scope="module")
def model() -> CvmTransformer:
    """It hardly ever ends a sentence, so that there is something to remember."""
    tiny = CvmTransformer(ModelConfig(**SIZES), 44)
    init_random(tiny, seed=5)
    with torch.no_grad():
        tiny.embedding.weight[EOS_ID] = 0.0
    return tiny


# -------------------------------------------------------------------------------------------------------------- measure


def test_the_bytes_of_a_bounded_memory_are_bounded(model: CvmTransformer) -> None:
    sources = [" ".join(["w5 w9 w1 w30"] * length) for length in (6, 8, 10)]
    bounded = slots.measure(WatchedModel(model, CAPACITY), Words(), sources)
    assert len(bounded["hypotheses"]) == 3 and min(len(text.split()) for text in bounded["hypotheses"]) > CAPACITY
    assert bounded["num_slots"] == CAPACITY
    assert bounded["num_bytes"] == CAPACITY * BYTES_A_SLOT  # whatever the source's length
    full = slots.measure(WatchedModel(model), Words(), sources)
    assert full["num_slots"] >= 41  # the longest source and its end mark
    assert full["num_bytes"] > bounded["num_bytes"]


def test_memory_is_of_what_is_held_and_not_of_what_is_in_reserve(model: CvmTransformer) -> None:
    watched = WatchedModel(model)
    slots.measure(watched, Words(), ["w1 w2 w3 w4 w5"])
    (state,) = watched.states
    num_tokens = state.length + 6  # its own, and the source's with the end mark
    assert state.count_bytes() == num_tokens * 2 * (2 * 32) * 4


# ------------------------------------------------------------------------------------------------------ texts and arms


def test_neighbours_are_joined_within_the_bounds_in_order() -> None:
    pairs = build_pairs(300, 20)
    texts = slots.join_pairs(pairs, Words(), 50, 90)
    lengths = [len(ids) for ids in Words().encode([text.source for text in texts])]
    assert len(texts) > 20 and 50 <= min(lengths) < 60 and 80 < max(lengths) <= 90
    assert texts == slots.join_pairs(pairs, Words(), 50, 90)
    for side in (0, 1):
        joined = " ".join(text[side] for text in texts)
        assert " ".join(pair[side] for pair in pairs).startswith(joined)


def test_what_is_too_long_for_the_bounds_is_left_out() -> None:
    texts = slots.join_pairs([*build_pairs(4, 4), *build_pairs(30, 30)[-1:], *build_pairs(8, 4)], Words(), 8, 20)
    assert all(8 <= len(text.source.split()) <= 20 for text in texts) and texts


def test_test_sets_without_long_sentences_are_refused() -> None:
    with pytest.raises(BenchmarkError, match="gives 0 single sentences"):
        slots.build_sets(build_pairs(500, 20), Words())
    sets = slots.build_sets(build_pairs(500, 30), Words())
    assert {len(pair.source.split()) for pair in sets[LONG]} == set(range(24, 31))


def test_the_arms_train_on_single_and_joined_pairs_of_training_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = build_pairs(3000, 30)
    splits = {"train": pairs[:2000], "validation": pairs[2000:2500], "test": pairs[2500:]}
    monkeypatch.setattr(slots, "load_split", lambda _, name: splits[name])
    slots.write_corpus(RunLayout(tmp_path / "run"), Words(), tmp_path)
    lines = {name: (tmp_path / f"{name}.tsv").read_text().splitlines() for name in splits}
    assert lines["train"][:2000] == [f"{pair.source}\t{pair.target}" for pair in splits["train"]]
    lengths = [len(line.split("\t")[0].split()) for line in lines["train"][2000:]]
    assert min(lengths) >= 24 and 380 < max(lengths) <= 400
    assert [len(lines[name]) for name in ("validation", "test")] == [108, 108]


def test_arms_differ_in_their_bound_alone(tmp_path: Path, model: CvmTransformer) -> None:
    loaded: Any = SimpleNamespace(config={"source_language": "de", "target_language": "en"}, model=model)
    options = Namespace(steps=20, num_threads=1, batch_tokens=500, learning_rate=1e-3)
    slots.write_config(tmp_path / "config.yaml", tmp_path / "start", loaded, options)
    bound = (f"student.model.core_capacity={CAPACITY}",)
    arms = [Arm(name, tmp_path / "config.yaml", own, tmp_path / "arm") for name, own in (("a", ()), ("b", bound))]
    control, bounded = (arm.load_config().to_plain() for arm in arms)
    assert control["student"]["model"] == SIZES | {"dropout": 0.1, "max_length": 512, "core_capacity": None}
    bounded["student"]["model"]["core_capacity"] = None
    assert bounded == control and control["distillation"]["num_iterations"] == 20
    assert control["corpus"]["test"][0]["path"] == str(tmp_path / "test.tsv")


def test_a_run_that_has_no_student_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="name a finished run"):
        slots.open_start(RunLayout(tmp_path))


@pytest.mark.parametrize("text", ["1,2", "4,4", "2,x", ""])
def test_capacities_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises((ArgumentTypeError, ValueError)):
        slots.parse_capacities(text)
    assert slots.parse_capacities("8,2") == [2, 8]


# -------------------------------------------------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def data(model: CvmTransformer) -> dict[str, Any]:
    """Two really measured sets, with arms that were trained alike."""
    names = {CONTROL: None, START: None, f"{CAPACITY} slots": CAPACITY, f"{CAPACITY} slots{AFTERWARDS}": CAPACITY}
    sets = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence, "NUM_DRAWS", 100)
        for name, pairs in (
            (LONG, build_pairs(30, 30)[-4:]),
            (JOINED, slots.join_pairs(build_pairs(20, 20), Words(), 50, 70)),
        ):
            sources = [pair.source for pair in pairs]
            rows = {row: slots.measure(WatchedModel(model, bound), Words(), sources) for row, bound in names.items()}
            sets[name] = {
                "num_sentences": len(pairs),
                "mean_tokens": 60.0,
                "rows": slots_results.compare(rows, pairs, "en"),
            }
    arm = {"num_iterations": 20, "executed_steps": 20, "num_skipped": 0, "batches": "same", "seconds": 1.0}
    return {
        "run": "tiny",
        "num_parameters": 1000,
        "steps": 20,
        "batch_tokens": 500,
        "learning_rate": 1e-3,
        "capacities": [CAPACITY],
        "training": {CONTROL: arm, f"{CAPACITY} slots": arm},
        "sets": sets,
    }


def change(data: dict[str, Any], *keys: str, **values: Any) -> dict[str, Any]:
    """The data with other values in the dict at these keys."""
    if not keys:
        return data | values
    return data | {keys[0]: change(data[keys[0]], *keys[1:], **values)}


def test_the_checks_hold_and_each_can_fail(data: dict[str, Any]) -> None:
    row = f"{CAPACITY} slots"
    assert not any(slots_results.find_failures(data).values())
    for number, bad in enumerate(
        (
            change(data, "sets", LONG, "rows", row + AFTERWARDS, num_slots=CAPACITY + 1),
            change(data, "training", CONTROL, num_iterations=19, executed_steps=19),
            change(data, "training", row, batches="others"),
            change(data, "sets", JOINED, "rows", row, byte_ratio=1.01),
        )
    ):
        failures = list(slots_results.find_failures(bad).values())
        assert [bool(found) for found in failures] == [place == number for place in range(4)]
    assert "repeated" in str(slots_results.find_failures(change(data, "training", row, executed_steps=21)))


def test_a_failed_check_is_told_and_is_the_exit_code(
    data: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for results, expected in ((data, 0), (change(data, "training", CONTROL, executed_steps=21), 1)):
        results = results | {"failures": slots_results.find_failures(results)}
        text = slots_results.format_results(results)
        assert evidence.conclude(tmp_path, slots.NAME, results, text) == expected
        assert ("- FAILED: every arm was trained for 20 steps" in capsys.readouterr().out) == bool(expected)


def test_both_sets_are_in_the_table_and_in_the_plot(data: dict[str, Any]) -> None:
    text = slots_results.format_results(data | {"failures": {}})
    tables = [line for line in text.splitlines() if line.startswith(f"| {CAPACITY} slots")]
    assert len(tables) == 4 and all("[" in line and line.count("|") == 8 for line in tables)
    assert f"4 {LONG}, 60 source tokens" in text
    assert slots_results.plot(data).startswith(b"\x89PNG")
