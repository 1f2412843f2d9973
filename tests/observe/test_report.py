"""The report: complete from a full folder, honest from a bare one, inert with hostile text."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from cvm_translator.errors import RunFolderError
from cvm_translator.observe.evidence import count_errors, list_error_counts
from cvm_translator.observe.facts import flatten, read_facts
from cvm_translator.observe.report import write_report

PAYLOADS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% raw %}",
    "[x](javascript:alert(1)) ![y](http://evil/p.png)",
    "a | b `c` <!-- d",
    "\x1b[2J\x1b]0;owned\x07",
    "\u202etxt.exe \u2066a\u2069",
]


def _final_report() -> dict[str, Any]:
    spec = importlib.util.spec_from_file_location("observe_fixtures", Path(__file__).parent / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.final_report()


class Page(HTMLParser):
    """Collects the tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def _write(root: Path) -> tuple[str, Page]:
    markdown = write_report(root)
    return markdown.read_text(encoding="utf-8"), Page(markdown.with_suffix(".html").read_text(encoding="utf-8"))


def test_a_full_report(make_run: Callable[..., Path]) -> None:
    root = make_run()
    markdown, page = _write(root)
    for text in (markdown.replace("\\", ""), page.text):
        for part in (
            "Gate passed", "keeps 95.7 % of the teacher's quality score", "11,900,000", "(9.9× smaller)", "45.4 MiB",
            "tokens/s", "33.11 [32.07, 34.15]", "Retention: BLEU (gated)", "96.1 % [94.7, 97.5]", "-1.18",
            "quality 18.2 % below the best", "Unseen domain", "File “%(name)s” could not be saved.", "Worst cases",
            "distillation.temperature", "near duplicate", "14472", "2.13.0", "train.tsv.sha256",
        ):  # fmt: skip
            assert part in text, part
    names = ["training", "teacher_training", "validation", "retention", "errors", "sizes"]
    for name in names:
        assert (root / "reports" / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert f"(plots/{name}.png)" in markdown
    assert page.tags.count("img") == len(names)


def test_the_page_is_self_contained(make_run: Callable[..., Path]) -> None:
    _, page = _write(make_run())
    assert not {"script", "link", "iframe", "object", "embed", "form", "base", "svg"} & set(page.tags)
    sources = [value for name, value in page.attributes if name in ("src", "href", "action", "srcset", "data", "style")]
    assert sources and all(value and value.startswith("data:image/png;base64,") for value in sources)
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_the_markdown_parses_as_meant(make_run: Callable[..., Path]) -> None:
    markdown, _ = _write(make_run())
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    kinds = [token.type for token in tokens]
    assert kinds.count("table_open") == markdown.count("\n| :-- |")
    html = {token.content.strip() for token in tokens if token.type == "html_block"}
    assert all(re.fullmatch(r"<details><summary>[\w ,-]+</summary>|</details>", text) for text in html)
    inline = [child.type for token in tokens if token.type == "inline" for child in token.children or []]
    assert not {"link_open", "html_inline", "code_inline"} & set(inline)
    assert inline.count("image") == 6


def test_a_bare_folder_says_what_is_not_measured(tmp_path: Path) -> None:
    events = tmp_path / "logs" / "events.jsonl"
    events.parent.mkdir()
    events.write_text(json.dumps({"kind": "run_started", "time": "2026-03-01T08:00:00+00:00", "step": None}) + "\n")
    markdown, page = _write(tmp_path)
    for text in (markdown, page.text):
        assert "Not gated" in text
        assert len(re.findall("not measured", text, re.IGNORECASE)) >= 8
    assert "img" not in page.tags


@pytest.mark.parametrize(
    "key", ["gate", "test", "unseen", "gaps", "models", "samples", "preflight", "seconds", "corpus"]
)
def test_every_key_may_be_missing(make_run: Callable[..., Path], no_plots: None, key: str) -> None:
    report = _final_report()
    del report[key]
    _write(make_run(report=report))


def test_a_failed_gate_says_by_how_much(make_run: Callable[..., Path], no_plots: None) -> None:
    report = _final_report()
    report["gate"] |= {"passed": False, "failures": ["bleu keeps 86.1 %, below 90 %"]}
    report["test"]["int8"]["retentions"]["bleu"] = {"value": 0.861, "low": 0.84, "high": 0.88}
    report["halted"] = True
    _, page = _write(make_run(report=report))
    assert "Gate failed: BLEU 3.9 points short, halted" in page.text
    assert "bleu keeps 86.1 %, below 90 %" in page.text and "halted the run" in page.text


def test_a_student_without_quantisation_is_judged_as_float(make_run: Callable[..., Path], no_plots: None) -> None:
    report = _final_report()
    del report["test"]["int8"], report["models"]["int8"]
    _, page = _write(make_run(report=report))
    assert "The float student keeps 96.6 %" in page.text and "Student, int8" not in page.text


@pytest.mark.parametrize("payload", PAYLOADS)
def test_hostile_text_is_inert_wherever_it_stands(make_run: Callable[..., Path], no_plots: None, payload: str) -> None:
    report = copy.deepcopy(_final_report())
    report["samples"] = report["worst"] = [
        dict.fromkeys(("source", "reference", "teacher", "student", payload), payload)
    ]
    report["gate"] |= {"passed": False, "failures": [payload]}
    report["rollbacks"][0]["reason"] = payload
    report["preflight"]["warnings"] = [payload]
    report["models"][payload] = {payload: 1}
    report["test"]["int8"]["scores"][payload] = {"value": 1.0}
    report["gaps"][payload] = {payload: 1.0}
    report["seconds"][payload] = 3.0
    report["corpus"] = {payload: payload}
    root = make_run(report=report)
    for name in ("environment.json", "corpus/filters.json", "corpus/manifest.json", "student/metadata.json"):
        (root / name).write_text(json.dumps({payload: [payload, {payload: payload}]}))
    with open(root / "logs" / "events.jsonl", "a") as stream:
        fields = {"reason": payload, "verdict": payload, "stage": "distil", "step": 1, "attempt": 1, "run_id": payload}
        for kind in ("verdict", "rollback", "run_started"):
            stream.write(json.dumps({"kind": kind, "time": payload, **fields}) + "\n")
    markdown, page = _write(root)
    clean_tags = set(_write(make_run("clean"))[1].tags)
    assert set(page.tags) <= clean_tags | {"ul", "li"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    for text in (markdown, page.text):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    html = {token.content.strip() for token in tokens if token.type == "html_block"}
    assert all(re.fullmatch(r"<details><summary>[\w ,-]+</summary>|</details>", text) for text in html)
    inline = [child for token in tokens if token.type == "inline" for child in token.children or []]
    assert not [child for child in inline if child.type in ("link_open", "html_inline", "code_inline")]
    assert all(str(child.attrs["src"]).startswith("plots/") for child in inline if child.type == "image")


def test_writers_take_turns(make_run: Callable[..., Path]) -> None:
    root = make_run()
    threads = [threading.Thread(target=write_report, args=(root,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not list((root / "reports").rglob(".tmp-*"))
    assert (root / "reports" / "comparison_report.html").read_text().rstrip().endswith("</html>")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"holds no run.*--output-dir"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_file_is_named(make_run: Callable[..., Path]) -> None:
    root = make_run()
    (root / "corpus" / "filters.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"filters\.json is no JSON"):
        write_report(root)


def test_nothing_outside_reports_is_touched(make_run: Callable[..., Path], no_plots: None) -> None:
    root = make_run()

    def outside() -> dict[Path, tuple[int, int]]:
        files = [path for path in root.rglob("*") if path.is_file() and "reports" not in path.parts]
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}

    before = outside()
    write_report(root)
    assert outside() == before


def test_counts_come_from_the_validation_records_where_there_are_any(make_run: Callable[..., Path]) -> None:
    root = make_run()
    (root / "validation").mkdir()
    counts = {"under_translation": 4, "over_translation": 3, "placeholders": 2, "differs_from_teacher": 900}
    record = {"step": 700, "attempt": 2, "error_analysis": {"error_counts": counts}}
    (root / "validation" / "step_700.attempt_2.json").write_text(json.dumps(record))
    (root / "validation" / "step_700.json").write_text(json.dumps(record | {"attempt": 1, "probes": {"empty": 77}}))
    (root / "validation" / "teacher.json").write_text(json.dumps({"probes": {"placeholders": 1}}))
    facts = read_facts(root)
    found = dict(list_error_counts(facts))
    assert found[700] == {"under_translation": 4, "over_translation": 3, "placeholders": 2, "length_ratio": 7}
    assert set(found[800]) == set(facts.history.student_validations()[7]["probes"]) - {"sentences"}
    assert count_errors(facts.validations["teacher"]) == {"placeholders": 1}


def test_flattening_keeps_plain_entries_on_one_line() -> None:
    data = {
        "a": {"b": 1.5, "c": None},
        "packages": [{"name": "x", "sha256": None, "kind": "wheel"}],
        "on": True,
        "n": [],
    }
    assert flatten(data) == [
        ("a.b", "1.5"), ("a.c", "–"), ("packages[0]", "name x, kind wheel"), ("on", "yes"), ("n", "none"),
    ]  # fmt: skip
