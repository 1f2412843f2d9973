"""What travels with the student: metadata for programs, a model card for people. Pure functions of the final report."""

from __future__ import annotations

from typing import Any

from cvm_translator import __version__
from cvm_translator.config import RunConfig


def build_metadata(config: RunConfig, final: dict[str, Any], folders: dict[str, Any]) -> dict[str, Any]:
    """`student/metadata.json`: what the model is, what it was judged with, and how it was made."""
    deployed = final["deployed"]
    return {
        "format": "cvm-translator student",
        "cvm_translator_version": __version__,
        "run_id": final["run_id"],
        "source_language": config.corpus.source_language,
        "target_language": config.corpus.target_language,
        "deployed": deployed,
        "folders": sorted(folders),
        "judged_with": {"runtime": "native", "beam_size": config.validation.beam_size},
        "models": final["models"],
        "gate": final["gate"],
        "test": final["test"],
        "num_iterations": final["num_iterations"],
        "executed_steps": final["executed_steps"],
        "halted": final["halted"],
        "best_step": final["best_step"],
        "corpus": final["corpus"],
        "config": config.to_plain(),
    }


def build_model_card(config: RunConfig, final: dict[str, Any]) -> str:
    """`student/README.md`."""
    deployed, teacher = final["deployed"], final["models"]["teacher"]
    model, test = final["models"][deployed], final["test"]
    source, target = config.corpus.source_language, config.corpus.target_language
    word = "passed" if final["gate"]["passed"] else "FAILED"
    lines = [
        f"# Translation model {source} to {target}",
        "",
        f"A CVM Transformer of {model['num_parameters']:,} parameters in {model['number_format']}"
        f" ({model['num_bytes'] / 2**20:.1f} MiB), distilled from a teacher of {teacher['num_parameters']:,} parameters"
        f" ({teacher['num_bytes'] / 2**20:.1f} MiB in {teacher['number_format']}).",
        "",
        f"The quality gate **{word}**: at least {config.guard.quality_threshold:.0%} of the teacher's quality score,"
        " BLEU and chrF on test sentences that no decision has seen.",
        "",
        "| metric | teacher | this model | retention |",
        "|---|---|---|---|",
    ]
    for name, score in test[deployed]["scores"].items():
        kept = test[deployed]["retentions"].get(name)
        retention = f"{kept['value']:.1%}" if kept else ""
        lines.append(f"| {name} | {_interval(test['teacher']['scores'][name])} | {_interval(score)} | {retention} |")
    quality = test[deployed]["retentions"]["quality_score"]
    lines += [
        f"| quality score | 1 | {_interval(quality)} | {quality['value']:.1%} |",
        "",
        "Values are followed by their 95 % confidence intervals over the test sentences.",
        "",
        "## Use",
        "",
        "```sh",
        "echo 'Datei nicht gefunden.' | cvm-translator translate --model .",
        "```",
        "",
        "## How it was made",
        "",
        f"{final['num_iterations']:,} distillation steps ({final['executed_steps']:,} executed,"
        f" {len(final['rollbacks'])} rollbacks), best validation at step {final['best_step']}; temperature"
        f" {config.distillation.temperature:g}, alpha {config.distillation.alpha:g}, beta {config.distillation.beta:g},"
        f" divergence {config.distillation.divergence}; {_describe_quantization(config)}.{_describe_bound(config)}"
        " Trained on"
        f" {final['corpus']['train']:,} sentence pairs (SHA-256 of the corpus {final['corpus']['sha256'][:16]}).",
        "All settings are in `metadata.json`, the evidence in the run's `reports/comparison_report.md`.",
        "",
        "## Limits",
        "",
        "The model knows the kind of text it was trained on. Scores on another domain are in the report; measure on"
        " your own text (`cvm-translator validate`) before you rely on it.",
    ]
    return "\n".join(lines) + "\n"


def _describe_bound(config: RunConfig) -> str:
    capacity = config.student.model.core_capacity
    if capacity is None:
        return ""
    return f" Its decoder's attention keeps at most {capacity} slots, which other runtimes do not have."


def describe_outcome(final: dict[str, Any]) -> str:
    """What was kept, in one line for the terminal."""
    deployed = final["deployed"]
    teacher, student = (final["models"][name] for name in ("teacher", deployed))
    teacher_bleu, student_bleu = (final["test"][name]["scores"]["bleu"]["value"] for name in ("teacher", deployed))
    kept = final["test"][deployed]["retentions"]
    share = f" ({kept['bleu']['value']:.1%})" if "bleu" in kept else ""  # of a teacher that scores 0 there is none
    return (
        f"test set: teacher BLEU {teacher_bleu:.1f}, {deployed} student {student_bleu:.1f}{share};"
        f" quality {kept['quality_score']['value']:.1%};"
        f" {teacher['num_bytes'] / 2**20:.1f} MiB to {student['num_bytes'] / 2**20:.1f} MiB"
        f" ({teacher['num_bytes'] / student['num_bytes']:.1f} times smaller),"
        f" {student['tokens_per_second'] / teacher['tokens_per_second']:.1f} times the teacher's tokens per second"
    )


def describe_verdict(final: dict[str, Any]) -> str:
    """The run's answer and what it rests on, for a terminal that showed nothing else."""
    word = "gate passed" if final["gate"]["passed"] else f"GATE FAILED: {'; '.join(final['gate']['failures'])}"
    halted = f" (halted: {final['halt_reason']})" if final["halted"] else ""
    return f"{word}{halted}; {describe_outcome(final)}"


def _describe_quantization(config: RunConfig) -> str:
    settings = config.quantization
    words = {
        "none": "no quantisation",
        "qat": f"quantisation-aware training to {settings.bits} bits",
        "progressive": f"quantisation-aware training with ever fewer bits, {settings.bits} in the end",
        "mixed": "layers quantised after training to 4, 8 or 16 bits by their sensitivity",
    }
    return words.get(settings.method, f"quantised after training to {settings.bits} bits ({settings.method})")


def _interval(figure: dict[str, float]) -> str:
    return f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"
