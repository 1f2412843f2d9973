"""Model folders and checkpoints made by somebody who knows the format: is any of them believed, run, or let grow?

Sizes, hashes and checksums are made to fit, so that what is wrong is only found by who looks at the content. Crafted
are weights, configurations, quantisation plans, tokenizers and pickles in checkpoints (`hostile_files`); beside them
the header of good weights is changed at random, a bit each. Checked are:

- every crafted file is refused by one line that can be shown;
- nothing in any of them is run: a pickle would leave a folder behind;
- a changed header is refused, or says exactly what it said before;
- each is judged within a second of processor time, and all together within 64 MiB of memory.

    python -m benchmarks.reliability.hostile_models

It begins anew each time. The program ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import random
import resource
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import sentencepiece
import torch

from benchmarks import common, evidence
from benchmarks.reliability.hostile_files import (
    HOSTILE_CONFIGS,
    HOSTILE_WEIGHTS,
    MARK,
    Evil,
    edit_header,
    edit_plan,
    rewrite_config,
    rewrite_manifest,
    zip_bomb,
    zip_pickle,
)
from benchmarks.reliability.small_training import train
from cvm_translator.checkpoints.folder import load_checkpoint
from cvm_translator.config.schema import ModelConfig
from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.errors import CheckpointError, ModelError
from cvm_translator.models.folder import load_model, save_model
from cvm_translator.models.initialization import init_random
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.quantization import AdvancedQuantizer

NAME = "hostile_models"
MAX_SECONDS = 1.0
MAX_GROWTH_BYTES = 64 << 20
MAX_MESSAGE = 600
WEIGHTS, TOKENIZER, CONFIG = "model.safetensors", "sentencepiece.model", "config.json"

REFUSED = "every crafted file is refused by one line that can be shown"
NOT_RUN = "nothing in any of them is run"
HEADERS = "a changed header is refused, or says what it said before"
BOUNDED = (
    f"each is judged within {MAX_SECONDS:g} s of processor time, and all within {MAX_GROWTH_BYTES >> 20} MiB of memory"
)


def build_good_models(work: Path) -> tuple[Path, Path, Path]:
    """A float model, a 4-bit one, and a checkpoint: small and sound."""
    work.mkdir(parents=True)
    stream = io.BytesIO()
    texts = [f"kara lone miso tuld {number} ." for number in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=stream, vocab_size=300, byte_fallback=True, hard_vocab_limit=False,
        bos_id=0, pad_id=1, eos_id=2, unk_id=3, minloglevel=2,
    )  # fmt: skip
    path = work / TOKENIZER
    path.write_bytes(stream.getvalue())
    tokenizer = Tokenizer.load(path)
    sizes = {"dim": 32, "num_heads": 4, "feed_forward_dim": 48, "encoder_layers": 2, "decoder_layers": 2}
    model = CvmTransformer(ModelConfig.model_validate(sizes | {"max_length": 24}), tokenizer.vocab_size)
    init_random(model, 0)
    languages: dict[str, Any] = {"source_language": "de", "target_language": "en"}
    sound = save_model(work / "float", model, tokenizer, **languages)
    small = save_model(
        work / "int4", AdvancedQuantizer("weight_only", 4, group_size=16).convert(model), tokenizer, **languages
    )
    train(work, 4)
    return sound, small, (work / "checkpoints" / "latest").resolve()


Case = tuple[str, Callable[[], object]]
Prepare = Callable[[Path], object]


def put_file(name: str, content: bytes, refit: Prepare) -> Prepare:
    """Put a file in a folder and make its hashes fit."""

    def prepare(folder: Path) -> None:
        (folder / name).write_bytes(content)
        refit(folder)

    return prepare


def change_config(changes: Mapping[str, Any]) -> Prepare:
    return lambda folder: rewrite_config(folder, **changes)


def list_cases(work: Path, sound: Path, small: Path, checkpoint: Path) -> list[Case]:
    """Each crafted folder, and the call that must refuse it."""
    cases: list[Case] = []

    def add(what: str, source: Path, load: Callable[[Path], object], prepare: Prepare) -> None:
        folder = work / "cases" / str(len(cases))
        shutil.copytree(source, folder)
        prepare(folder)
        cases.append((what, lambda: load(folder)))

    good, evil = (sound / WEIGHTS).read_bytes(), pickle.dumps(Evil(), protocol=2)  # torch warns of others
    tensors = safetensors.torch.load(good)
    weights = HOSTILE_WEIGHTS | edit_header(good)
    for what, value in {"NaN": float("nan"), "infinity": float("inf")}.items():
        weights[what] = safetensors.torch.save(tensors | {"encoder_norm.bias": tensors["encoder_norm.bias"] + value})
    for what, content in weights.items():
        add(f"weights: {what}", sound, load_model, put_file(WEIGHTS, content, rewrite_config))
    tokenizers = {"pickle": evil, "noise": random.Random(3).randbytes(5000), "empty": b""}
    tokenizers["cut short"] = (sound / TOKENIZER).read_bytes()[:-900]
    for what, content in tokenizers.items():
        add(f"tokenizer: {what}", sound, load_model, put_file(TOKENIZER, content, rewrite_config))
    for what, changes in HOSTILE_CONFIGS.items():
        add(f"config: {what}", sound, load_model, change_config(changes))
    configs = {"deep": b"[" * 100_000, "pickle": evil, "huge": b" " * (2 << 20), "not utf-8": b"\xff\xfe{"}
    for what, content in configs.items():
        add(f"config: {what}", sound, load_model, put_file(CONFIG, content, lambda folder: None))
    plan = json.loads((small / CONFIG).read_text())["quantization"]["plan"]
    for what, section in edit_plan(plan).items():
        for kind in ("int4", "mixed"):
            changes = {"quantization": section, "number_format": kind}
            add(f"plan: {what} as {kind}", small, load_model, change_config(changes))
    for what, content in {"pickle": evil, "torch archive": zip_pickle(), "archive that unfolds": zip_bomb()}.items():
        for name in ("optimizer.pt", "random.pt", "model.safetensors"):
            prepare = put_file(name, content, rewrite_manifest)
            add(f"checkpoint: {what} as {name}", checkpoint, load_checkpoint, prepare)
    return cases


def change_headers(work: Path, sound: Path, num_trials: int, generator: random.Random) -> tuple[int, list[str]]:
    """Flip bits of a good header; how many files were refused, and what was neither refused nor the same."""
    folder = work / "header"
    shutil.copytree(sound, folder)
    good = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(good[:8], "little")
    expected, wrong, num_refused = safetensors.torch.load(good), [], 0
    for trial in range(num_trials):
        changed, place = bytearray(good), generator.randrange(8 + length)
        changed[place] ^= 1 << generator.randrange(8)
        (folder / WEIGHTS).write_bytes(changed)
        rewrite_config(folder)
        try:
            state = load_model(folder).model.state_dict()
        except ModelError:
            num_refused += 1
            continue
        except Exception as error:  # any other is a defect
            wrong.append(f"trial {trial}, byte {place}: {type(error).__name__}: {error}")
            continue
        if any(not torch.equal(state[name], tensor) for name, tensor in expected.items()):
            wrong.append(f"trial {trial}, byte {place}: other weights")
    return num_refused, wrong


def judge(cases: list[Case], failures: dict[str, list[str]]) -> float:
    """Have every case refused; the longest processor time that one took."""
    slowest = 0.0
    for what, load in cases:
        start = time.process_time()
        try:
            load()
            failures[REFUSED].append(f"{what}: loaded")
        except (ModelError, CheckpointError) as error:
            if len(str(error)) > MAX_MESSAGE:
                failures[REFUSED].append(f"{what}: a message of {len(str(error))} characters")
        except Exception as error:  # any other is a defect
            failures[REFUSED].append(f"{what}: {type(error).__name__}: {str(error)[:100]}")
        seconds = time.process_time() - start
        slowest = max(slowest, seconds)
        if seconds > MAX_SECONDS:
            failures[BOUNDED].append(f"{what}: {seconds:.1f} s")
        if Path(MARK).exists():
            failures[NOT_RUN].append(what)
            Path(MARK).rmdir()
    return slowest


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_benchmark(options: Namespace) -> dict[str, Any]:
    work, here = options.work.resolve(), Path.cwd()
    shutil.rmtree(work, ignore_errors=True)
    failures: dict[str, list[str]] = {REFUSED: [], NOT_RUN: [], HEADERS: [], BOUNDED: []}
    sound, small, checkpoint = build_good_models(work)
    cases = list_cases(work, sound, small, checkpoint)
    for load, path in ((load_model, sound), (load_model, small), (load_checkpoint, checkpoint)):
        load(path)  # what is good is taken, and the libraries are warm
    os.chdir(work)
    try:
        before = peak_bytes()
        slowest = judge(cases, failures)
        growth = peak_bytes() - before
        num_refused, failures[HEADERS] = change_headers(work, sound, options.headers, random.Random(options.seed))
    finally:
        os.chdir(here)
    if growth > MAX_GROWTH_BYTES:
        failures[BOUNDED].append(f"{growth / 2**20:.0f} MiB")
    shutil.rmtree(work)
    kinds: dict[str, int] = {}
    for what, _ in cases:
        kinds[what.split(":")[0]] = kinds.get(what.split(":")[0], 0) + 1
    return {
        "cases": [what for what, _ in cases],
        "kinds": kinds,
        "slowest_seconds": slowest,
        "growth_bytes": growth,
        "num_headers": options.headers,
        "num_headers_refused": num_refused,
        "failures": failures,
    }


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the counts as Markdown."""
    lines = [
        "# Hostile model files",
        "",
        *evidence.describe_checks(data["failures"]),
        "",
        f"{len(data['cases'])} crafted folders: "
        + ", ".join(f"{kind} {count}" for kind, count in data["kinds"].items()),
        f"The slowest was judged in {data['slowest_seconds']:.2f} s; the peak of memory grew by"
        f" {data['growth_bytes'] / 2**20:.0f} MiB. Of {data['num_headers']:,} headers with one bit changed"
        f" {data['num_headers_refused']:,} were refused; the others said what they had said before.",
    ]
    lines[-2] += "."
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Load model folders and checkpoints that are crafted to do harm.")
    parser.add_argument("--headers", type=int, default=1000, metavar="N", help="headers with one bit changed")
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME)
    return parser


def main() -> int:
    options = build_parser().parse_args()
    data = run_benchmark(options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    if sys.platform == "win32":
        sys.exit("error: this benchmark measures memory by getrusage: run it on Linux or macOS")
    common.run_main(main)
