"""From trained weights to a proven product: the student's files, the gate on unseen test sentences, the report.

The gate judges what is delivered: each model folder is loaded from its files in a fresh process (`measure`) and its
translations of a test set that no decision has seen are scored against the teacher's. The report is written by a
process of its own from the run folder alone, which proves that the folder suffices.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cvm_translator.corpus.records import Pair
from cvm_translator.corpus.tokenizer import Tokenizer
from cvm_translator.errors import RunFolderError
from cvm_translator.models.transformer import CvmTransformer
from cvm_translator.pipeline.arrange import arrange_gate, arrange_perplexities, arrange_scores, negate
from cvm_translator.pipeline.cards import build_metadata, build_model_card
from cvm_translator.pipeline.context import RunContext, StageRecord, stage
from cvm_translator.pipeline.formats import (
    Calibration,
    build_deploy,
    choose_plan,
    name_format,
    save_plan,
)
from cvm_translator.pipeline.measure import measure_folder
from cvm_translator.pipeline.parts import build_dataset, save_model_folder
from cvm_translator.pipeline.student import StudentOutcome
from cvm_translator.pipeline.teacher import Teacher
from cvm_translator.pipeline.text import Corpus
from cvm_translator.quantization import convert_with_plan
from cvm_translator.runs import atomic
from cvm_translator.runs.events import read_events, sum_stage_seconds
from cvm_translator.validation import TranslationQualityEvaluator, ValidationConfig
from cvm_translator.validation.judge import judge_models

NUM_SAMPLES = 12
NUM_WORST = 12


def quantise(
    context: RunContext, corpus: Corpus, tokenizer: Tokenizer, teacher: Teacher, outcome: StudentOutcome
) -> dict[str, Path]:
    """Write the student's folders: `float` always, and the deployed number format. Returns the folders by name."""
    config, bits = context.config, outcome.loop.bits
    folders = {"float": context.layout.student / "float"}
    deployed = name_format(config.quantization, bits)
    if deployed is not None:
        folders[deployed] = context.layout.student / deployed
    if bits != config.quantization.bits:
        context.warn("width", f"quality was not held at {config.quantization.bits} bits: {bits} bits are delivered")
    with stage(context, "quantise") as note:
        record = StageRecord(context.layout, "quantise", {"weights": hash_weights(outcome.weights), "bits": bits})
        if record.load() is not None:
            note.skipped = True
        else:
            student = CvmTransformer(config.student.model, tokenizer.vocab_size)
            student.load_state_dict(outcome.weights)
            metadata = {
                "role": "student",
                "step": outcome.loop.state.best_step,
                "quantization": {"method": config.quantization.method, "bits": bits},
            }
            save_model_folder(context, folders["float"], student.eval(), tokenizer, metadata)
            if deployed is not None:
                converted = _convert(context, student, corpus, tokenizer, teacher, bits)
                save_model_folder(context, folders[deployed], converted, tokenizer, metadata)
            record.save({}, [folder / "model.safetensors" for folder in folders.values()])
        note.summary = {
            f"{name}_bytes": (folder / "model.safetensors").stat().st_size for name, folder in folders.items()
        }
    return folders


def _convert(
    context: RunContext, student: CvmTransformer, corpus: Corpus, tokenizer: Tokenizer, teacher: Teacher, bits: int
) -> CvmTransformer:
    """The student as the validations scored it; for method mixed, its plan is written beside it, to be used again."""
    settings = context.config.quantization
    dataset = build_dataset(context, corpus, tokenizer, student.config, teacher.model.config)
    calibration = Calibration(dataset, settings.calibration_sentences, context.config.seed)
    if settings.method != "mixed":
        return build_deploy(settings, calibration)(student, bits)
    plan = choose_plan(settings, student, calibration)
    save_plan(context.layout.student / "quantization_plan.yaml", plan)
    if not plan.get("target_met", True):
        context.warn("quantization", f"quantisation plan: {plan['message']}")
    return convert_with_plan(student, plan["plan"], calibration.run)


def hash_weights(weights: dict[str, torch.Tensor]) -> str:
    """Hash of a state_dict's values."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def gate(context: RunContext, corpus: Corpus, teacher: Teacher, folders: dict[str, Path]) -> dict[str, Any]:
    """Judge the delivered folders on the test set and the unseen domain; the verdict is the run's."""
    layout, config = context.layout, context.config
    models = {"teacher": teacher.folder, **folders}
    sets = {"test": corpus.test, "unseen": corpus.unseen}
    sets = {name: pairs for name, pairs in sets.items() if pairs}
    with stage(context, "gate") as note:
        inputs = {
            "models": {name: atomic.sha256_file(folder / "model.safetensors") for name, folder in models.items()},
            "corpus": corpus.sha256,
            "validation": config.validation.model_dump(),
            "guard": config.guard.model_dump(),
        }
        record = StageRecord(layout, "gate", inputs)
        result = record.load()
        note.skipped = result is not None
        if result is None:
            result = _judge(context, models, sets)
            record.save(result, [])
        note.summary = {"passed": result["gate"]["passed"]}
    return result


def _judge(context: RunContext, models: dict[str, Path], sets: dict[str, Any]) -> dict[str, Any]:
    layout, config = context.layout, context.config
    paths = {name: layout.corpus / f"{name}.tsv" for name in sets}
    num_sentences = sum(map(len, sets.values()))
    measured = {}
    for name, folder in models.items():
        who = "the teacher" if name == "teacher" else f"the {name} student"
        context.note(f"gate: {who} translates {num_sentences:,} sentences in a process of its own")
        measured[name] = measure_folder(
            folder,
            paths,
            layout.stages / f"measured_{name}.json",
            beam_size=config.validation.beam_size,
            batch_size=config.validation.batch_size,
            device=str(context.device),
            num_threads=torch.get_num_threads(),
            with_references=True,
        )
    settings = ValidationConfig.from_run(config, str(context.device))
    evaluator = TranslationQualityEvaluator(settings)
    deployed = list(models)[-1]
    judged = {}
    perplexities = {}
    for name, pairs in sets.items():
        translated = {model: _recall(data["hypotheses"][name]) for model, data in measured.items()}
        judged[name] = judge_models(
            settings,
            [pair.source for pair in pairs],
            [pair.target for pair in pairs],
            translated.pop("teacher"),
            translated,
            deployed,
            evaluator,
        ).report
        losses = {model: np.array(data["reference_losses"][name]) for model, data in measured.items()}
        perplexities[name] = arrange_perplexities(losses, config.guard.num_resamples, settings.seed)
    figures = (
        "num_parameters",
        "num_bytes",
        "peak_memory_mib",
        "baseline_memory_mib",
        "tokens_per_second",
        "number_format",
    )
    return {
        "deployed": deployed,
        "gate": arrange_gate(judged["test"]["gate"]),
        "gaps": {
            f"{gap['from']}_to_{gap['to']}": gap["score_differences"] | {"quality_score": negate(gap["quality_loss"])}
            for gap in judged["test"]["gaps"]
        },
        "signatures": judged["test"]["signatures"],
        **{name: arrange_scores(report, perplexities[name]) for name, report in judged.items()},
        "models": {name: {key: data[key] for key in figures} for name, data in measured.items()},
        **_choose_examples(
            evaluator, sets["test"], measured["teacher"]["hypotheses"], measured[deployed]["hypotheses"]
        ),
    }


def _recall(hypotheses: list[str]) -> Callable[[list[str]], list[str]]:
    """Stands in for a model whose translations of the set were made in its own process."""
    return lambda _: hypotheses


def _choose_examples(
    evaluator: TranslationQualityEvaluator,
    pairs: Sequence[Pair],
    teacher: dict[str, list[str]],
    student: dict[str, list[str]],
) -> dict[str, Any]:
    """Evenly spaced samples, and the sentences with the lowest chrF."""
    sources, references = [pair.source for pair in pairs], [pair.target for pair in pairs]
    chrf = next(metric for metric in evaluator.metrics if metric.name == "chrf")
    scores = chrf.score(chrf.statistics(student["test"], references, sources))  # (N,)

    def show(index: int) -> dict[str, Any]:
        return {
            "source": sources[index],
            "reference": references[index],
            "teacher": teacher["test"][index],
            "student": student["test"][index],
            "chrf": float(scores[index]),
        }

    spaced = np.linspace(0, len(pairs) - 1, min(NUM_SAMPLES, len(pairs))).astype(int)
    worst = np.argsort(scores, kind="stable")[:NUM_WORST]
    return {"samples": [show(int(i)) for i in spaced], "worst": [show(int(i)) for i in worst]}


def report(
    context: RunContext, corpus: Corpus, outcome: StudentOutcome, folders: dict[str, Path], verdict: dict[str, Any]
) -> dict[str, Any]:
    """Write final_report.json, the student's metadata and model card, and have the report written from the folder."""
    layout, state = context.layout, outcome.loop.state
    with stage(context, "report") as note:
        final = {
            "run_id": atomic.read_json(layout.environment)["run_id"],
            "halted": outcome.loop.halted is not None,
            "halt_reason": outcome.loop.halted,
            "num_iterations": state.step,
            "executed_steps": state.executed_steps,
            "num_skipped": state.num_skipped,
            "rollbacks": state.rollbacks,
            "best_step": state.best_step,
            "preflight": outcome.preflight,
            "corpus": {"sha256": corpus.sha256} | {name: len(pairs) for name, pairs in corpus.splits().items()},
            **verdict,
        }
        record = StageRecord(layout, "report", final)
        written = record.load()
        if written is not None:
            note.skipped = True
            return written
        final["seconds"] = sum_stage_seconds(read_events(layout.events))
        atomic.write_json(layout.final_report, final)
        atomic.write_json(layout.student / "metadata.json", build_metadata(context.config, final, folders))
        atomic.write_text(layout.student / "README.md", build_model_card(context.config, final))
        _write_comparison_report(layout.root)
        record.save(final, [layout.final_report, layout.student / "metadata.json", layout.student / "README.md"])
    return final


def _write_comparison_report(root: Path) -> None:
    command = [sys.executable, "-m", "cvm_translator", "report", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RunFolderError(f"the report of {root} could not be written: {last[0].removeprefix('error: ')}")
