"""Text of a corpus or a model that would like to act: through real events into everything an observer shows.

The judges are parsers: html.parser for pages, a CommonMark parser for Markdown, a terminal's rules for what is printed.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from benchmarks.reliability.hostile_pages import MARK, PAYLOADS
from cvm_translator.observe.alerts import alerts_of_event, alerts_of_status
from cvm_translator.observe.delivery import build_payload
from cvm_translator.observe.history import read_history
from cvm_translator.observe.live import build_view
from cvm_translator.observe.machine import MachineFigures
from cvm_translator.observe.monitor import main
from cvm_translator.observe.plots import plot_retention, plot_validation
from cvm_translator.observe.report import write_report
from cvm_translator.observe.status import format_status, read_status
from cvm_translator.observe.status_report import write_status_report
from cvm_translator.observe.watch import RunWatch
from cvm_translator.runs.events import EventWriter, read_events
from cvm_translator.runs.layout import RunLayout

ELEMENTS = {
    *("html", "head", "meta", "title", "style", "body", "main", "h1", "h2", "p", "div", "strong", "table", "thead"),
    *("tbody", "tr", "th", "td", "figure", "img", "figcaption", "ul", "li", "dl", "dt", "dd", "details", "summary"),
}
ATTRIBUTES = {"lang", "charset", "http-equiv", "content", "name", "class", "alt", "src", "dir"}


class Judge(HTMLParser):
    """Collects what in a page did not come from its template."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[str] = []
        self.text = ""
        self.num_metas = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ELEMENTS:
            self.found.append(tag)
        self.num_metas += tag == "meta"
        for name, value in attributes:
            if name not in ATTRIBUTES or name.startswith("on"):
                self.found.append(f"{tag} {name}")
            if name == "src" and not (value or "").startswith("data:image/png;base64,"):
                self.found.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.found.append("comment")

    def handle_pi(self, data: str) -> None:
        self.found.append("instruction")

    def unknown_decl(self, data: str) -> None:
        self.found.append("declaration")


def judge_page(page: str) -> Judge:
    judge = Judge()
    judge.feed(page)
    judge.close()
    return judge


def judge_markdown(text: str) -> list[str]:
    """Raw HTML, links and pictures that lead out."""
    found = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        for part in [token, *(token.children or [])]:
            target = str(part.attrs.get("href") or part.attrs.get("src") or "")
            is_ours = part.type == "image" and re.fullmatch(r"plots/\w+\.png", target)
            is_fold = part.type == "html_block" and re.fullmatch(
                r"(<details><summary>[^<>]*</summary>|</details>)", part.content.strip()
            )
            if (target and not is_ours) or (part.type in ("html_block", "html_inline") and not is_fold):
                found.append(f"{part.type} {target or part.content!r}")
    return found


def assert_harmless_on_a_terminal(text: str) -> None:
    assert [character for character in text if character != "\n" and not character.isprintable()] == []


@pytest.fixture(params=range(4))
def payloads(request: pytest.FixtureRequest) -> list[str]:
    """Every fourth of them, so that a run carries several."""
    return PAYLOADS[request.param :: 4]


@pytest.fixture
def hostile_run(make_run: Callable[..., Path], payloads: list[str]) -> Path:
    """A run whose events hold the payloads wherever text can stand."""
    root = make_run(until="distil", total=100)
    with EventWriter(root / "logs" / "events.jsonl") as events:
        for number, payload in enumerate(payloads, start=2):
            _write_hostile_events(events, payload, number)
        scores = {"bleu": 30.0} | dict.fromkeys(payloads, 1.0)
        events.write("validation", step=95, attempt=3, stage="distil", scores=scores, teacher_scores=scores,
                     quality_score=0.9, retentions=scores, probes=scores)  # fmt: skip
        events.write("stage_started", stage=payloads[0])
        events.write("failed", message=" ".join(payloads))
    text = "".join(f"a line {payload}\n" for payload in payloads)
    (root / "logs" / "train.log").write_text(text, encoding="utf-8", errors="surrogatepass")
    return root


def _write_hostile_events(events: EventWriter, payload: str, number: int) -> None:
    events.write("warning", step=1, code=payload, message=payload)
    events.write("rollback", step=100, attempt=number, stage="distil", reason=payload, from_step=100, to_step=90,
                 rollback_number=number, learning_rate_factor=0.5, data_stream=number)  # fmt: skip
    events.write("verdict", step=95, attempt=3, stage="distil", verdict="degraded", action=payload, reason=payload,
                 drop=0.1, drop_lower_bound=0.09, margin=0.05, best_step=90)  # fmt: skip
    events.write("verdict", step=95, attempt=3, stage="distil", verdict=payload, action="keep", reason=payload)
    events.write("checkpoint", step=95, attempt=3, stage="distil", path=payload, is_best=True, num_bytes=1)
    events.write("resumed", step=95, attempt=3, stage="distil", exact=False, differences=[payload])


def test_status_live_view_log_and_webhook(hostile_run: Path, payloads: list[str]) -> None:
    from rich.console import Console

    status = read_status(hostile_run)
    assert_harmless_on_a_terminal(format_status(status))
    events = list(read_events(hostile_run / "logs" / "events.jsonl"))
    alerts = [alert for event in events for alert in alerts_of_event(event)] + alerts_of_status(status)
    assert {"rollback", "degradation", "inexact_resume", "failed"} <= {alert.name for alert in alerts}
    for alert in alerts:
        assert_harmless_on_a_terminal(alert.line())
        assert "\n" not in alert.line()
        text = json.dumps(build_payload(alert, status), ensure_ascii=True)
        assert text.isascii() and text.isprintable()
        assert not re.search(r"[<>@]", json.loads(text)["text"])
    watch = RunWatch(RunLayout(hostile_run))
    watch.poll()
    console = Console(file=io.StringIO(), width=120, height=60, force_terminal=True, color_system=None)
    console.print(build_view(watch.status(), watch.history, MachineFigures(), alerts, list(watch.log_lines), 60))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert_harmless_on_a_terminal(shown)
    if any("[bold red]" in payload for payload in payloads):
        assert f"[bold red]{MARK}[/bold red]" in re.sub(r"\s*│\s*", "", shown)  # no markup of data is obeyed
    watch.close()


def test_status_report(no_plots: None, hostile_run: Path, payloads: list[str]) -> None:
    log = hostile_run / "monitor" / "alerts.log"
    log.parent.mkdir()
    text = "".join(f"t CRITICAL x/y: {payload}\n" for payload in payloads)
    log.write_text(text, encoding="utf-8", errors="surrogatepass")
    markdown = write_status_report(hostile_run)
    judge_both(markdown, payloads, num_metas=5)


def test_comparison_report(no_plots: None, hostile_run: Path, payloads: list[str]) -> None:
    path = hostile_run / "reports" / "final_report.json"
    report = json.loads(path.read_text())
    samples = [dict.fromkeys(("source", "reference", "teacher", "student"), payload) for payload in payloads]
    report["samples"], report["worst"] = samples, [sample | {"score": 1.0} for sample in samples]
    report["gate"]["failures"] = report["preflight"]["warnings"] = payloads
    report["rollbacks"] = [report["rollbacks"][0] | {"reason": payload} for payload in payloads]
    path.write_text(json.dumps(report))
    judge_both(Path(write_report(hostile_run)).with_suffix(".md"), payloads, num_metas=4)


def test_plots(hostile_run: Path, payloads: list[str]) -> None:
    """Names of metrics are drawn as they are, whatever a plotting library would make of them."""
    history = read_history(hostile_run / "logs" / "events.jsonl")
    png = plot_validation(history)
    assert png is not None and png.startswith(b"\x89PNG")
    retentions = {name: {"value": 0.9, "low": 0.8, "high": 1.0} for name in ("bleu", *payloads)}
    assert plot_retention(retentions, 0.9, ["bleu"]) is not None


def judge_both(path: Path, payloads: list[str], num_metas: int) -> None:
    """A report's Markdown and its page: nothing acts, and what is in the payloads is shown, not swallowed."""
    markdown, page = path.read_text(encoding="utf-8"), path.with_suffix(".html").read_text(encoding="utf-8")
    plain = judge_page(page)
    assert plain.found == [] and plain.num_metas == num_metas
    assert judge_markdown(markdown) == []
    assert_harmless_on_a_terminal(markdown)
    assert_harmless_on_a_terminal(page)
    assert "1337" not in page + markdown
    for text in (plain.text, markdown):
        assert text.count(MARK) >= sum(MARK in payload for payload in payloads)


def test_a_page_forbids_what_it_does_not_hold(no_plots: None, make_run: Callable[..., Path]) -> None:
    write_status_report(make_run())
    page = next(Path(make_run("again").parent).rglob("status_report.html")).read_text()
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in page


@pytest.mark.parametrize("as_json", [False, True])
def test_what_the_monitor_prints(
    as_json: bool, no_plots: None, make_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """All payloads at once, by the whole monitor."""
    root = make_run(until="distil", total=100)
    with EventWriter(root / "logs" / "events.jsonl") as events:
        for text in PAYLOADS:
            events.write("warning", step=1, code=text, message=text)
            events.write("rollback", step=5, stage="distil", reason=text, from_step=5, to_step=4, rollback_number=1)
        events.write("failed", message="".join(PAYLOADS))
    assert main(root, as_json=as_json, refresh_seconds=0.05) == 4
    out, err = capsys.readouterr()
    assert_harmless_on_a_terminal(out + err)
    assert_harmless_on_a_terminal((root / "monitor" / "alerts.log").read_text())


@pytest.mark.parametrize(
    "text", ["<script>x()</script>", "<p onclick=x()>", "<b>", "<img src=http://e/x>", "<!-- x -->", "<?x?>"]
)
def test_the_judge_of_pages_finds_what_is_foreign(text: str) -> None:
    assert judge_page(f"<p>{text}</p>").found != []


@pytest.mark.parametrize("text", ["<b>x</b>", "[a](http://e)", "![a](http://e/x.png)", "<script>", "<http://e.org>"])
def test_the_judge_of_markdown_finds_what_is_foreign(text: str) -> None:
    assert judge_markdown(text) != []
