"""The report's second half: errors, the unseen domain, sentences, and what is looked up. Facts in, blocks out.

Every function is pure. What was not measured says `not measured`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cvm_translator.observe.document import Block, Cell, Fold, Records, Table, Text
from cvm_translator.observe.facts import Facts, dig, flatten
from cvm_translator.observe.sections import list_score_rows, model_name, show_retention
from cvm_translator.observe.text import (
    NOT_MEASURED,
    as_number,
    error_name,
    format_count,
    format_number,
    format_score,
    is_known,
    ordered_metrics,
    short_metric_name,
)

UNCOUNTED = ("sentences", "num_sentences", "differs_from_teacher")
"""Counts that stand beside the error categories without being one."""
KNOWN_METADATA = ("models", "gate", "test", "config", "corpus", "num_iterations", "executed_steps", "best_step")
"""Parts of the student's metadata that the report tells elsewhere."""


def count_errors(record: Mapping[str, Any] | None) -> dict[str, Any]:
    """Sentences by error category in one validation's record or event."""
    found = dig(record, "error_analysis.error_counts") or (record or {}).get("probes") or {}
    counts = {name: value for name, value in found.items() if name not in UNCOUNTED}
    if "under_translation" in counts and "over_translation" in counts:
        counts.setdefault("length_ratio", counts["under_translation"] + counts["over_translation"])
    return counts


def list_error_counts(facts: Facts) -> list[tuple[int, dict[str, Any]]]:
    """The error categories of each validation of the student's own history, by step."""
    records = {(r.get("step"), r.get("attempt", 1)): r for r in facts.validations.values()}
    return [
        (v["step"], count_errors(records.get((v["step"], v.get("attempt", 1)))) or count_errors(v))
        for v in facts.history.student_validations()
    ]


def build_errors(facts: Facts) -> list[Block]:
    """Error categories on the test set, and over the validations."""
    test = facts.final.get("test") or {}
    counts = {name: count_errors(test.get(name)) for name in list_models(facts, test)}
    blocks: list[Block] = []
    categories = sorted({key for found in counts.values() for key in found})
    if categories:
        rows = [[error_name(key), *(format_count(found.get(key)) for found in counts.values())] for key in categories]
        headers = ["Sentences of the test set with", *(model_name(name) for name in counts)]
        blocks.append(Table(headers, rows))
    blocks += _by_length(test, facts.deployed)
    validated = list_error_counts(facts)
    if len(validated) > 1:
        (first, before), (last, after) = validated[0], validated[-1]
        rows = [
            [error_name(key), format_count(before.get(key)), format_count(after.get(key)), _change(before, after, key)]
            for key in sorted({*before, *after})
        ]
        headers = ["Sentences of the validation set with", f"Step {first:,}", f"Step {last:,}", "Change"]
        blocks.append(Fold("Error categories, first against last validation", [Table(headers, rows)]))
    return blocks or [Text(f"Error categories: {NOT_MEASURED}.")]


def _change(before: Mapping[str, Any], after: Mapping[str, Any], key: str) -> str:
    change = as_number(after.get(key)) - as_number(before.get(key))
    return f"{change:+,.0f}" if is_known(change) else "–"


def _by_length(test: Mapping[str, Any], deployed: str) -> list[Block]:
    """Scores of the student and the teacher by length of the source."""
    buckets = [
        row for row in dig(test, f"{deployed}.error_analysis.scores_by_length") or [] if isinstance(row, Mapping)
    ]
    metrics = [key for key in ("bleu", "chrf") if any(key in (row.get("scores") or {}) for row in buckets)]
    if not metrics:
        return []
    rows = [
        [
            str(row.get("bucket")),
            format_count(row.get("num_sentences")),
            *(
                format_score(key, (row.get(side) or {}).get(key))
                for key in metrics
                for side in ("teacher_scores", "scores")
            ),
        ]
        for row in buckets
    ]
    sides = [f"{short_metric_name(key)}, {side}" for key in metrics for side in ("teacher", "student")]
    return [Table(["Source length", "Sentences", *sides], rows)]


def list_models(facts: Facts, found: Mapping[str, Any]) -> list[str]:
    names = dict.fromkeys(("teacher", "float", facts.deployed))
    return [name for name in names if found.get(name)]


def build_unseen(facts: Facts) -> list[Block]:
    unseen = facts.final.get("unseen") or {}
    names = list_models(facts, unseen)
    if not names:
        return [Text(f"A domain that training never saw: {NOT_MEASURED}.")]
    rows = list_score_rows(unseen, names)
    for key in ordered_metrics({key for name in names for key in (dig(unseen, f"{name}.retentions") or {})}):
        cells = [show_retention(dig(unseen, f"{name}.retentions.{key}") or {}, None) for name in names]
        rows.append([f"Retention: {short_metric_name(key)}", *cells])
    table = Table(["", *(model_name(name) for name in names)], rows)
    return [Text("Text from a domain that was kept out of training whole; reported, not gated."), table]


def build_samples(samples: Any) -> list[Block]:
    """Sentences with their translations; other keys (a score) are shown after them."""
    labels = {"source": "Source", "reference": "Reference", "teacher": "Teacher", "student": "Student"}
    labels |= {"sentence": "Line of the test set", "teacher_chrf": "chrF of the teacher", "errors": "Errors"}
    items = []
    for sample in samples or []:
        if isinstance(sample, Mapping):
            names = [name for name in labels if name in sample] + [name for name in sample if name not in labels]
            items.append([(labels.get(name, short_metric_name(name)), _show(sample[name])) for name in names])
    return [Records(items)] if items else [Text(f"{NOT_MEASURED.capitalize()}.")]


def _show(value: Any) -> str:
    if isinstance(value, int):
        return format_count(value)
    if isinstance(value, float):
        return format_number(value, 1)
    return ", ".join(str(item) for item in value) or "none" if isinstance(value, list) else str(value)


def build_worst(facts: Facts) -> list[Block]:
    """The lowest scores, and where the student loses most against its teacher."""
    blocks = build_samples(facts.final.get("worst"))
    losses = dig(facts.final, f"test.{facts.deployed}.error_analysis.largest_losses")
    if losses:
        blocks.append(Fold("Largest losses against the teacher", build_samples(losses)))
    return blocks


def build_details(facts: Facts) -> list[Block]:
    final = facts.final
    parts: dict[str, Any] = {
        "All hyper-parameters": facts.config,
        "Checks before training": {k: v for k, v in (final.get("preflight") or {}).items() if k != "warnings"},
        "Metric signatures": final.get("signatures") or {},
        "Corpus": final.get("corpus") or {},
        "What each filter dropped": facts.filters,
        "Corpus files and hashes": facts.manifest,
        "Environment": facts.environment,
        "Student metadata": {k: v for k, v in facts.metadata.items() if k not in KNOWN_METADATA},
    }
    return [Fold(title, [_table(flatten(data) if data else [])]) for title, data in parts.items()]


def _table(rows: Sequence[tuple[str, str]]) -> Block:
    if not rows:
        return Text(f"{NOT_MEASURED.capitalize()}.")
    cells: list[list[str | Cell]] = [[name, value] for name, value in rows]
    return Table(["Name", "Value"], cells, numeric=False)
