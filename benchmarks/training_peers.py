"""The systems that `benchmarks.training` compares this project with, on its problem.

Seq2SeqTrainer (extra `peers`) runs in this process. Joey NMT wants older libraries than this project, so it runs in an
interpreter of its own, through `joeynmt_training.py`, which knows nothing of this project.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from benchmarks.common import REPOSITORY, BenchmarkError
from benchmarks.training_problem import ALPHA, BETA, TEMPERATURE, Parts, Stopwatch
from cvm_translator.errors import import_optional
from cvm_translator.models.huggingface import to_m2m100
from cvm_translator.models.transformer import CvmTransformer

IGNORED = -100


def run_trainer(parts: Parts, folder: Path, *, is_tuned: bool) -> dict[str, float]:
    """Seq2SeqTrainer, with the teacher in each step where there is one."""
    transformers = import_optional("transformers", "peers")
    import_optional("accelerate", "peers")
    problem, watch, teacher = parts.problem, Stopwatch(parts.problem.num_warm_up), _convert_teacher(parts)
    collate = Collate()

    class Callback(transformers.TrainerCallback):  # type: ignore[name-defined]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.mark(counted[0])

    class Trainer(transformers.Seq2SeqTrainer):  # type: ignore[name-defined]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            counted[0] += int((inputs["labels"] != IGNORED).sum())
            return super().training_step(model, inputs, *args, **kwargs)

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            if teacher is None:
                return super().compute_loss(model, inputs, return_outputs, **kwargs)
            return _distil(model, teacher, inputs)

    counted = [0]
    pairs = (parts.dataset[index] for index in range(len(parts.dataset)))
    rows = [{"input_ids": [*source.tolist(), 2], "labels": [*target.tolist(), 2]} for source, target in pairs]
    tuned = {"bf16": True, "train_sampling_strategy": "group_by_length"} if is_tuned else {}
    arguments = transformers.Seq2SeqTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=problem.batch_size,
        max_steps=problem.num_steps + problem.num_warm_up,
        learning_rate=1e-4,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
        logging_strategy="no",
        **tuned,
    )
    trainer = Trainer(
        model=_convert(parts.student), args=arguments, train_dataset=rows, data_collator=collate, callbacks=[Callback()]
    )
    trainer.train()
    return {"tokens_per_second": watch.rate(), "padding_efficiency": collate.num_real / collate.num_padded}


class Collate:
    """Rows of ids to padded tensors; counts what it pads, which costs nothing worth measuring."""

    def __init__(self) -> None:
        self.num_real = self.num_padded = 0

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        def pad(name: str, value: int) -> torch.Tensor:
            tensors = [torch.tensor(row[name]) for row in rows]
            padded: torch.Tensor = nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)
            self.num_real += sum(map(len, tensors))
            self.num_padded += padded.numel()
            return padded

        source, labels = pad("input_ids", 1), pad("labels", IGNORED)
        return {"input_ids": source, "attention_mask": (source != 1).long(), "labels": labels}


def _distil(model: Any, teacher: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of a step with the teacher online, as such trainers are usually written."""
    outputs = model(**inputs)
    real = inputs["labels"] != IGNORED
    shifted = nn.functional.pad(inputs["labels"].masked_fill(~real, 1)[:, :-1], (1, 0), value=2)
    with torch.no_grad():  # without labels, so that the teacher computes no loss
        sources = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        wanted = teacher(**sources, decoder_input_ids=shifted, use_cache=False).logits
    divergence = nn.functional.kl_div(
        (outputs.logits[real].float() / TEMPERATURE).log_softmax(-1),
        (wanted[real].float() / TEMPERATURE).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    total: torch.Tensor = ALPHA * TEMPERATURE**2 * divergence + BETA * outputs.loss
    return total


def _convert(model: CvmTransformer) -> Any:
    transformers = import_optional("transformers", "peers")
    sizes, weights = to_m2m100(model)
    converted = transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**sizes))
    converted.load_state_dict(weights, strict=False)
    return converted


def _convert_teacher(parts: Parts) -> Any:
    return None if parts.teacher is None else _convert(parts.teacher).eval().requires_grad_(False)


def check_joeynmt(python: Path) -> None:
    """Refuse an interpreter that has no Joey NMT."""
    try:
        done = subprocess.run(
            [python, "-I", "-c", "import joeynmt.training"], capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise BenchmarkError(f"--joeynmt {python}: {error.strerror}: name a Python interpreter") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason"])[-1]
        remedy = f"{python} -m pip install joeynmt importlib-metadata"  # the second one it does not ask for itself
        raise BenchmarkError(f"--joeynmt {python}: it has no Joey NMT ({reason}): {remedy}")


def run_joeynmt(parts: Parts, folder: Path, python: Path) -> dict[str, float]:
    """Joey NMT's own trainer in that interpreter, on a student of the same sizes and the same sentences."""
    pairs = [parts.dataset[index] for index in range(len(parts.dataset))]
    for name, chosen in (("train", pairs), ("dev", pairs[:1])):
        for side, language in enumerate(("src", "trg")):
            lines = (" ".join(map(str, pair[side].tolist())) + "\n" for pair in chosen)
            (folder / f"{name}.{language}").write_text("".join(lines), encoding="utf-8")
    pieces = ["<unk>", "<pad>", "<s>", "</s>", *map(str, range(4, parts.problem.vocabulary))]
    (folder / "vocabulary.txt").write_text("".join(f"{piece}\n" for piece in pieces), encoding="utf-8")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(build_joeynmt_config(parts, folder)), encoding="utf-8")
    script = REPOSITORY / "benchmarks" / "joeynmt_training.py"
    command = [str(python), "-I", str(script), str(config), str(parts.problem.num_warm_up)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    if done.returncode:
        raise BenchmarkError(f"Joey NMT failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def build_joeynmt_config(parts: Parts, folder: Path) -> dict[str, Any]:
    """Pre-norm Transformer with one matrix for all embeddings and the output, sentences a batch, no validation."""
    problem, sizes = parts.problem, parts.student.config

    def describe_side(language: str) -> dict[str, Any]:
        return {"lang": language, "level": "word", "lowercase": False, "max_length": 1000} | {
            "voc_min_freq": 0,
            "voc_limit": problem.vocabulary,
            "voc_file": str(folder / "vocabulary.txt"),
        }

    def describe_stack(num_layers: int) -> dict[str, Any]:
        return {
            "type": "transformer",
            "num_layers": num_layers,
            "num_heads": sizes.num_heads,
            "embeddings": {"embedding_dim": sizes.dim, "scale": True, "dropout": sizes.dropout},
            "hidden_size": sizes.dim,
            "ff_size": sizes.feed_forward_dim,
            "dropout": sizes.dropout,
            "layer_norm": "pre",
        }

    return {
        "name": "benchmark",
        "joeynmt_version": "2.3.0",
        "model_dir": str(folder / "model"),
        "use_cuda": False,
        "random_seed": 7,
        "data": {
            "train": str(folder / "train"),
            "dev": str(folder / "dev"),
            "dataset_type": "plain",
            "src": describe_side("src"),
            "trg": describe_side("trg"),
        },
        "testing": {"beam_size": 1, "eval_metrics": ["bleu"]},
        "training": {
            "optimizer": "adamw",
            "learning_rate": 1e-4,
            "learning_rate_min": 1e-9,
            "scheduling": "decaying",  # at the end of epochs, of which there is one
            "clip_grad_norm": 1.0,
            "normalization": "tokens",
            "batch_size": problem.batch_size,
            "batch_type": "sentence",
            "epochs": 2,
            "updates": problem.num_steps + problem.num_warm_up,
            "logging_freq": 1,
            "validation_freq": 1_000_000,
        },
        "model": {
            "initializer": "xavier_uniform",
            "embed_initializer": "xavier_uniform",
            "tied_embeddings": True,
            "tied_softmax": True,
            "encoder": describe_stack(sizes.encoder_layers),
            "decoder": describe_stack(sizes.decoder_layers),
        },
    }
