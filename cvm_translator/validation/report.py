"""`best_model_validation_report.txt`: the best validation, told to a person.

Model output is hostile until proven otherwise: control characters are shown as escapes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from cvm_translator.validation.detector import QualityDegradationDetector
from cvm_translator.validation.result import ValidationResult

RULE = "-" * 100


def visible(text: str) -> str:
    """The text with control and formatting characters spelled out, so that a terminal shows and does not obey them."""
    return "".join(
        character if unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else f"\\u{ord(character):04x}"
        for character in text
    )  # fmt: skip


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns padded to their widest cell: the first left-aligned, the others right-aligned."""
    table = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(len(header))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in table
    ]
    return ["  " + line.rstrip() for line in [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]]


def number(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if name in ("bertscore", "comet") else f"{value:.2f}"


def section(title: str, lines: Iterable[str]) -> list[str]:
    return ["", title, RULE[: len(title)], *lines]


def _score_lines(result: ValidationResult) -> list[str]:
    best = result.comparisons.get("best", {}).get("metrics", {})
    rows = []
    for name, score in result.scores.items():
        low, high = result.intervals[name]
        retention = result.retentions.get(name)
        change = best.get(name)
        rows.append(
            [
                name,
                number(name, score),
                f"[{number(name, low)}, {number(name, high)}]",
                number(name, result.teacher_scores.get(name)),
                "-" if retention is None else f"{retention:.1%}",
                "-" if change is None else f"{change['difference']:+.2f}",
                "-" if change is None else f"{change['p_value']:.3f}",
            ]
        )
    header = ["metric", "score", "95 % interval", "teacher", "retention", "vs. last best", "p"]
    return [*format_table(header, rows), "", "  ter: lower is better; a retention of 100 % is the teacher's quality."]


def _length_lines(result: ValidationResult) -> list[str]:
    names = [name for name in ("bleu", "chrf", "ter", "bertscore") if name in result.scores]
    rows = []
    for entry in result.error_analysis["scores_by_length"]:
        row = [entry["bucket"], str(entry["num_sentences"])]
        for name in names:
            teacher = entry.get("teacher_scores", {}).get(name)
            suffix = "" if teacher is None else f" ({number(name, teacher)})"
            row.append(number(name, entry["scores"][name]) + suffix)
        rows.append(row)
    return [*format_table(["source length", "sentences", *names], rows), "", "  In brackets: the teacher."]


def _error_lines(result: ValidationResult) -> list[str]:
    changes = result.error_analysis.get("error_changes", {})
    rows = [
        [name.replace("_", " "), str(count), f"{count / result.num_sentences:.1%}",
         f"{changes[name]:+d}" if name in changes else "-"]
        for name, count in result.error_analysis["error_counts"].items()
    ]  # fmt: skip
    return format_table(["category", "sentences", "share", "since the previous validation"], rows)


def _sentence_lines(entries: Sequence[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for entry in entries:
        errors = f"  ({', '.join(entry['errors'])})" if entry["errors"] else ""
        teacher = f", teacher {entry['teacher_chrf']:.1f}" if "teacher_chrf" in entry else ""
        lines.append(f"  #{entry['sentence']}  chrF {entry['chrf']:.1f}{teacher}{errors}")
        lines.extend(
            f"    {label:<10}{visible(entry[label])}"
            for label in ("source", "reference", "teacher", "student")
            if label in entry
        )
        lines.append("")
    return lines[:-1]


def format_best_report(result: ValidationResult, detector: QualityDegradationDetector) -> str:
    """The whole report as text."""
    verdict = result.verdict
    quality = "-" if result.quality_score is None else f"{result.quality_score:.4f}"
    if verdict.quality_interval is not None:
        quality += f"  [{verdict.quality_interval[0]:.4f}, {verdict.quality_interval[1]:.4f}]"
    weights = ", ".join(f"{name} {weight:g}" for name, weight in detector.scale.weights.items())
    left_out = detector.scale.left_out
    lines = [
        "BEST MODEL: VALIDATION REPORT",
        RULE,
        f"  step {result.step}, attempt {result.attempt}; {result.num_sentences} sentences",
        f"  validation set {result.set_sha256}",
        f"  quality score  {quality}   (1 is the teacher's quality; weights: {weights})",
        f"  verdict        {verdict.verdict}: {verdict.reason}",
    ]
    if left_out:
        lines.append(f"  left out       {', '.join(left_out)}: the teacher itself scores too low on it")
    if verdict.trend_message:
        lines.append(f"  trend          {verdict.trend_message}")
    speed = result.decode_tokens_per_second
    lines.append(
        f"  decoding       {result.decode_seconds:.1f} s" + (f", {speed:,.0f} tokens per second" if speed else "")
    )
    lines.append(f"  length         {result.length_ratio:.3f} characters generated per character of the references")
    lines.extend(f"  {name:<15}{_plain(value)}" for name, value in result.extra.items())
    lines += section("Scores", _score_lines(result))
    lines += section("By length of the source", _length_lines(result))
    lines += section("Errors", _error_lines(result))
    if "largest_losses" in result.error_analysis:
        lines += section("Largest losses against the teacher", _sentence_lines(result.error_analysis["largest_losses"]))
    if "worst_sentences" in result.error_analysis:
        lines += section("Worst sentences", _sentence_lines(result.error_analysis["worst_sentences"]))
    lines += section("Signatures", [f"  {signature}" for signature in result.signatures.values()])
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else visible(str(value))
