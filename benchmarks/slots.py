"""What does a bounded attention memory (`core_capacity`) cost in quality, and what does it save?

A finished run's float student, which has full attention, is trained on: once for each number of slots s with its
decoder bound to them, and once with full attention, the *control*. All arms are runs of the product with the same
start, steps, seed and batches: the run's training pairs one by one, and the same pairs joined with blanks to texts of
up to 400 source tokens, by cross-entropy alone, since no model here has seen long texts. For each s the control's
weights are also measured with the bound *put on afterwards*, which shows what training with it is worth.

Measured are two sets of the run's test pairs, which no arm has seen: single sentences of at least 24 source tokens, and
neighbours joined to 200 to 400. BLEU and chrF are those of greedy translations in float32, their differences from the
control's with 95 % intervals (paired bootstrap over sentences or texts). Memory is read from the tensors that the
decoder holds when a sentence is done: bytes of keys, values, counts and masks of self- and cross-attention, a mean over
some sentences that are decoded alone.

    python -m benchmarks.slots --run RUN_DIR --work /big/disk/slots

It can be killed and started again at any time: what is done is kept, what was begun is resumed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from benchmarks import common, evidence
from benchmarks.common import Arm, BenchmarkError
from benchmarks.slots_results import (
    AFTERWARDS,
    CONTROL,
    JOINED,
    LONG,
    START,
    compare,
    find_failures,
    format_results,
    name_row,
    plot,
)
from cvm_translator.corpus.build import load_split
from cvm_translator.corpus.records import Pair
from cvm_translator.models.decoding import TextTokenizer, translate_texts
from cvm_translator.models.description import CONFIG_FILE, WEIGHTS_FILE
from cvm_translator.models.folder import LoadedModel, load_model, save_model
from cvm_translator.models.transformer import CvmTransformer, DecoderState
from cvm_translator.pipeline.export.sentences import spaced
from cvm_translator.runs import atomic
from cvm_translator.runs.layout import RunLayout

NAME = "slots"
MIN_TOKENS = 24
JOINED_TOKENS = (200, 400)
"""Of a measured text's source; those of training texts are drawn from MIN_TOKENS on."""
MAX_LENGTH = 512
SEED = 13
BATCH_SIZE = 32
NUM_ALONE = 32
"""Sentences of each set whose memory is measured."""


# ---------------------------------------------------------------------------------------------------------------- texts


def join_pairs(pairs: Sequence[Pair], tokenizer: TextTokenizer, shortest: int, longest: int) -> list[Pair]:
    """Neighbours joined with blanks, each text up to a number of source tokens that is drawn between the bounds."""
    generator = np.random.default_rng(SEED)
    groups: list[list[Pair]] = []
    total = goal = 0
    for pair, ids in zip(pairs, tokenizer.encode([pair.source for pair in pairs]), strict=True):
        if total >= goal or total + len(ids) > longest:
            groups.append([])
            total, goal = 0, int(generator.integers(shortest, longest + 1))
        groups[-1].append(pair)
        total += len(ids)
    sides = [(" ".join(pair.source for pair in group), " ".join(pair.target for pair in group)) for group in groups]
    texts = [Pair(*both, group[0].origin) for both, group in zip(sides, groups, strict=True)]
    return keep_lengths(texts, tokenizer, shortest, longest)


def keep_lengths(pairs: Sequence[Pair], tokenizer: TextTokenizer, shortest: int, longest: int) -> list[Pair]:
    """The pairs whose sources have so many tokens."""
    encoded = tokenizer.encode([pair.source for pair in pairs])
    return [pair for pair, ids in zip(pairs, encoded, strict=True) if shortest <= len(ids) <= longest]


def build_sets(test: Sequence[Pair], tokenizer: TextTokenizer) -> dict[str, list[Pair]]:
    """What is measured."""
    sets = {
        LONG: keep_lengths(test, tokenizer, MIN_TOKENS, MAX_LENGTH - 1),
        JOINED: join_pairs(test, tokenizer, *JOINED_TOKENS),
    }
    for name, pairs in sets.items():
        if len(pairs) < 2:
            raise BenchmarkError(f"the test set gives {len(pairs)} {name}: name a run with longer or more test pairs")
    return sets


def write_corpus(run: RunLayout, tokenizer: TextTokenizer, folder: Path) -> None:
    """The arms' train.tsv, and small validation and test sets, on which no decision rests."""
    train, *held_out = (list(load_split(run.corpus, name)) for name in ("train", "validation", "test"))
    shuffled = [train[place] for place in np.random.default_rng(SEED).permutation(len(train)).tolist()]
    splits = {"train": [*train, *join_pairs(shuffled, tokenizer, MIN_TOKENS, JOINED_TOKENS[1])]}
    for name, pairs in zip(("validation", "test"), held_out, strict=True):
        splits[name] = [*spaced(pairs, 100), *spaced(join_pairs(pairs, tokenizer, *JOINED_TOKENS), 8)]
    for name, pairs in splits.items():
        atomic.write_text(folder / f"{name}.tsv", "".join(f"{pair.source}\t{pair.target}\n" for pair in pairs))


# ----------------------------------------------------------------------------------------------------------------- arms


def open_start(run: RunLayout) -> LoadedModel:
    folder = run.student / "float"
    if not (folder / CONFIG_FILE).is_file():
        raise BenchmarkError(f"--run {run.root} has no student/float: name a finished run")
    loaded = load_model(folder)
    if loaded.model.config.core_capacity is not None:
        raise BenchmarkError(f"--run {run.root} has a student with slots: name a run with full attention")
    return loaded


def write_config(path: Path, start: Path, loaded: LoadedModel, options: argparse.Namespace) -> None:
    """The config of all arms; what an arm has of its own is set over it."""
    plain = {"every_steps": options.steps, "metrics": ["bleu", "chrf"], "weights": {"bleu": 1.0, "chrf": 1.0}}
    config: dict[str, Any] = {
        "seed": SEED,
        "num_threads": options.num_threads,
        "tensorboard": False,
        "corpus": {
            "source_language": loaded.config["source_language"],
            "target_language": loaded.config["target_language"],
            **{name: [{"format": "tsv", "path": f"{name}.tsv"}] for name in ("train", "validation", "test")},
            # the run has cleaned the sentences; joined ones are longer
            "cleaning": {"max_characters": 10_000, "max_words": 2_000, "language_check": False},
        },
        "teacher": {"kind": "checkpoint", "path": str(start), "cache_dir": str(path.parent / "teachers")},
        "student": {
            "init": "teacher_layers",
            "model": loaded.model.config.model_dump() | {"max_length": MAX_LENGTH},
        },
        "distillation": {
            "alpha": 0.0,
            "beta": 1.0,
            "num_iterations": options.steps,
            "batch_tokens": options.batch_tokens,
            "learning_rate": options.learning_rate,
            "warmup_steps": options.steps // 10,
            "checkpoint_every_steps": 50,
        },
        "validation": plain | {"batch_size": BATCH_SIZE},
        "guard": {"enabled": False},
        "quantization": {"method": "none"},
    }
    atomic.write_text(path, yaml.safe_dump(config, sort_keys=False))


def build_arms(run: RunLayout, loaded: LoadedModel, options: argparse.Namespace) -> dict[int | None, Arm]:
    """One for each bound, and the control (None); their corpus and their start are written for it."""
    work = options.work.resolve() / atomic.sha256_file(run.student / "float" / WEIGHTS_FILE)[:16]
    start, config = work / "start", work / "config.yaml"
    if not start.exists():  # the same weights for longer texts, which a teacher's limit would keep out of the training
        languages = {side: loaded.config[side] for side in ("source_language", "target_language")}
        save_model(start, WatchedModel(loaded.model), loaded.tokenizer, **languages)
    write_corpus(run, loaded.tokenizer, work)
    write_config(config, start, loaded, options)
    arms: dict[int | None, Arm] = {None: Arm("control", config, (), work / "control")}
    for capacity in options.capacities:
        name = f"slots_{capacity}"
        arms[capacity] = Arm(name, config, (f"student.model.core_capacity={capacity}",), work / name)
    return arms


def describe_training(arm: Arm) -> dict[str, Any]:
    """What an arm was really trained on."""
    report = evidence.read_report(arm)
    num_tokens = {event["step"]: event["num_tokens"] for event in evidence.find_events(arm, "train")}
    return {
        **{key: report[key] for key in ("num_iterations", "executed_steps", "num_skipped")},
        "num_tokens": sum(num_tokens.values()),
        "batches": atomic.sha256_json([num_tokens[step] for step in sorted(num_tokens)]),
        "seconds": evidence.stage_seconds(arm),
    }


# -------------------------------------------------------------------------------------------------------------- measure


class WatchedModel(CvmTransformer):
    """The weights of a model with another bound, and room for long texts; keeps what decoding remembers.

    `states`: the state of each batch since it was cleared, as it was when the batch ended.
    """

    def __init__(self, model: CvmTransformer, capacity: int | None = None) -> None:
        super().__init__(
            model.config.model_copy(update={"core_capacity": capacity, "max_length": MAX_LENGTH}), model.vocab_size
        )
        self.load_state_dict(model.state_dict())
        self.states: list[DecoderState] = []
        self.eval()

    def start(self, memory: Tensor, src_mask: Tensor, beam_size: int = 1) -> DecoderState:
        self.states.append(super().start(memory, src_mask, beam_size))
        return self.states[-1]


def measure(model: WatchedModel, tokenizer: TextTokenizer, sources: Sequence[str]) -> dict[str, Any]:
    """Translations, the most slots that any of them took, and bytes a sentence that is decoded alone."""
    model.states.clear()
    hypotheses = translate_texts(model, tokenizer, sources, batch_size=BATCH_SIZE)
    most_slots = max(state.count_slots() for state in model.states)
    model.states.clear()
    translate_texts(model, tokenizer, spaced(sources, NUM_ALONE), batch_size=1)
    num_bytes = float(np.mean([state.count_bytes() for state in model.states]))
    return {"hypotheses": hypotheses, "num_slots": most_slots, "num_bytes": num_bytes}


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    run = RunLayout(options.run.resolve())
    loaded = open_start(run)
    sets = build_sets(load_split(run.corpus, "test"), loaded.tokenizer)
    arms = build_arms(run, loaded, options)
    common.run_arms(list(arms.values()), 1, options.num_threads)
    trained = {capacity: load_model(arm.layout.student / "float").model for capacity, arm in arms.items()}
    models = {CONTROL: WatchedModel(trained[None]), START: WatchedModel(loaded.model)}
    for capacity in options.capacities:
        models[name_row(capacity)] = WatchedModel(trained[capacity], capacity)
        models[name_row(capacity) + AFTERWARDS] = WatchedModel(trained[None], capacity)
    figures: dict[str, Any] = {}
    for name, pairs in sets.items():
        sources = [pair.source for pair in pairs]
        rows = {}
        for row, model in models.items():
            print(f"{name}: {row}", flush=True)
            rows[row] = measure(model, loaded.tokenizer, sources)
        num_tokens = sum(map(len, loaded.tokenizer.encode(sources)))
        figures[name] = {
            "num_sentences": len(pairs),
            "mean_tokens": num_tokens / len(pairs),
            "rows": compare(rows, pairs, loaded.config["target_language"]),
        }
    return {
        "run": options.run.name,
        "num_parameters": loaded.model.num_parameters(),
        "steps": options.steps,
        "batch_tokens": options.batch_tokens,
        "learning_rate": options.learning_rate,
        "capacities": options.capacities,
        "training": {name_row(capacity): describe_training(arm) for capacity, arm in arms.items()},
        "sets": figures,
    }


# -------------------------------------------------------------------------------------------------------------- program


def parse_capacities(text: str) -> list[int]:
    capacities = [int(part) for part in text.split(",")]
    if min(capacities) < 2 or len(set(capacities)) < len(capacities):
        raise argparse.ArgumentTypeError(f"{text}: different numbers from 2 on, with commas between them")
    return sorted(capacities)


def main() -> int:
    parser = common.build_plain_parser("Measure quality and memory of attention in a bounded number of slots.")
    parser.add_argument("--run", type=Path, required=True, metavar="RUN_DIR", help="a finished run with full attention")
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME, metavar="DIR")
    parser.add_argument("--capacities", type=parse_capacities, default="2,4,8,16,32", metavar="S,T,…")
    parser.add_argument("--steps", type=int, default=800, metavar="N", help="of every arm")
    parser.add_argument("--batch-tokens", type=int, default=2048, metavar="N", help="padded tokens a side of a step")
    parser.add_argument("--learning-rate", type=float, default=1e-3, metavar="R")
    parser.add_argument("--num-threads", type=int, default=1, metavar="T")
    parser.add_argument("--plot", type=Path, default=common.REPOSITORY / "docs" / "images" / "slots.png")
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    data = run_benchmark(options)
    data["failures"] = find_failures(data)
    atomic.write_bytes(options.plot, plot(data))
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
