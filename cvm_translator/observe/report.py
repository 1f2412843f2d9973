"""The comparison report: what the student kept of its teacher, and how that came about.

`write_report` reads the run folder and writes `reports/comparison_report.md`, the same as a self-contained `.html`, and
`reports/plots/*.png`, each whole or not at all, under a lock, so that two writers take turns. It can be called at any
time: what has not been measured yet says so.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from cvm_translator.observe import evidence, plots, sections
from cvm_translator.observe.document import Block, Document, Heading, Picture, Text, to_html, to_markdown
from cvm_translator.observe.facts import Facts, read_facts
from cvm_translator.observe.text import NOT_MEASURED
from cvm_translator.runs.atomic import write_bytes, write_text


def write_report(run_dir: str | Path) -> Path:
    """Write the report of a run folder anew; returns the Markdown file (the HTML page lies beside it)."""
    facts = read_facts(run_dir)
    reports = facts.layout.reports
    reports.mkdir(parents=True, exist_ok=True)
    with _one_writer(reports / ".lock"):
        document = build_document(facts)
        for picture in document.pictures():
            write_bytes(facts.layout.plots / f"{picture.name}.png", picture.png)
        markdown = reports / "comparison_report.md"
        write_text(markdown, to_markdown(document))
        write_text(markdown.with_suffix(".html"), to_html(document))
    return markdown


@contextlib.contextmanager
def _one_writer(path: Path) -> Iterator[None]:
    """Wait until no other writer is at work on these reports."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def build_document(facts: Facts) -> Document:
    """The report as blocks: the answer first, then the evidence, then what is looked up."""
    blocks: list[Block] = [sections.build_verdict(facts), *sections.build_advice(facts)]
    blocks += [Heading("Teacher against student"), *sections.build_comparison(facts)]
    retentions = facts.final.get("test", {}).get(facts.deployed, {}).get("retentions") or {}
    blocks += _picture("retention", "What the student keeps of its teacher", plots.plot_retention(
        retentions, facts.threshold, sections.gated_metrics(facts)))  # fmt: skip
    blocks += [Heading("Where quality went"), *sections.build_gaps(facts)]
    blocks += _picture("sizes", "Size and speed on this machine", plots.plot_sizes(facts.final.get("models") or {}))
    blocks += [Heading("Training"), *_training(facts)]
    blocks += [Heading("Validation"), *_validation(facts)]
    blocks += [Heading("Errors"), *_errors(facts)]
    blocks += [Heading("Guard"), *sections.build_guard(facts)]
    blocks += [Heading("Unseen domain"), *evidence.build_unseen(facts)]
    blocks += [Heading("Sample translations"), *evidence.build_samples(facts.final.get("samples"))]
    blocks += [Heading("Worst cases"), *evidence.build_worst(facts)]
    blocks += [Heading("How it was made"), *evidence.build_details(facts)]
    return Document(*sections.build_title(facts), blocks=blocks)


def _picture(name: str, title: str, png: bytes | None) -> list[Block]:
    return [Picture(name, title, png)] if png is not None else []


def _training(facts: Facts) -> list[Block]:
    curves = facts.history.curves
    student = plots.plot_training(curves.get("distil"), facts.rollbacks, facts.quantised_from)
    blocks = _picture("training", "Training of the student", student)
    blocks += _picture("teacher_training", "Training of the teacher", plots.plot_training(curves.get("teacher")))
    return [*(blocks or [Text(f"Training curves: {NOT_MEASURED}.")]), *sections.build_stage_times(facts)]


def _validation(facts: Facts) -> list[Block]:
    blocks = _picture("validation", "Scores on the validation set, as deployed", plots.plot_validation(facts.history))
    return [*(blocks or [Text(f"Validation curves: {NOT_MEASURED}.")]), *sections.build_validation_table(facts)]


def _errors(facts: Facts) -> list[Block]:
    teacher = evidence.count_errors(facts.validations.get("teacher"))
    png = plots.plot_errors(evidence.list_error_counts(facts), teacher)
    return [*_picture("errors", "Faulty outputs by category over the validations", png), *evidence.build_errors(facts)]
