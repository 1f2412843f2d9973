"""Does a browser run, load or hide anything when it opens reports full of hostile text?

A run folder is made whose events and final report hold every text of `PAYLOADS` wherever text of a corpus, a model or
an error can stand. Its status report and its comparison report are opened in a headless Chromium: as they were
delivered, with their own Content-Security-Policy; without it, so that the escaping is judged by itself; and with one
that forbids pictures. Each page is looked at from outside through the browser's debugging pipe, so nothing is added to
it. A script that ran would have marked the page; whatever the page loads goes through a proxy that counts; the plots
must be decoded and in view. A page with the same texts unescaped, and the one that may show no pictures, prove that the
judge would have found it.

    python -m benchmarks.reliability.hostile_pages [--browser PATH]

The program ends with 1 if anything ran or was loaded, or a plot is missing.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
from benchmarks.reliability.browser import Browser
from benchmarks.reliability.rotations import idle_run
from cvm_translator.runs.events import EventWriter

NAME = "hostile_pages"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
MARK = "pwned"
PAYLOADS = [
    f"<script>{MARK}()</script>",
    f"<SCRIPT SRC=//evil.example/{MARK}.js></SCRIPT>",
    f"</title></style></textarea></script><script>{MARK}()</script>",
    f"<img src=x onerror={MARK}()>",
    f"<svg/onload={MARK}()><animate onbegin={MARK}() attributeName=x dur=1s>",
    f'"><svg onload="{MARK}()">',
    f"' onmouseover='{MARK}()' x='",
    f'" autofocus onfocus="{MARK}()',
    f"<iframe srcdoc='<script>{MARK}()</script>'></iframe>",
    f"<a href='javascript:{MARK}()'>x</a>",
    f"<meta http-equiv=refresh content='0;url=javascript:{MARK}()'><base href=//evil.example>",
    f"<link rel=stylesheet href=//evil.example/{MARK}.css><style>@import '//evil.example'</style>",
    f"<form action=//evil.example><input name={MARK}><button formaction=javascript:{MARK}()>",
    f"<math><mtext></mtext><mglyph><style><img src=x onerror={MARK}()>",
    f"<!--><img src=x onerror={MARK}()>-->",
    f"<![CDATA[<script>{MARK}()</script>]]>",
    f"&lt;script&gt;{MARK}()&lt;/script&gt; &#60;script>",
    "{{ 7 * 191 }} {% include '/etc/passwd' %} ${7*191}",
    f"[click](javascript:{MARK}()) [x]: http://evil.example",
    f"![x](http://evil.example/{MARK}.png) <http://evil.example>",
    f"](http://evil.example) `code` **{MARK}** ~~x~~ | a | b |",
    f"\n# {MARK}\n\n- {MARK}\n\n```\n{MARK}",
    f"\n<details open ontoggle={MARK}()>\n",
    f"\x1b[2J\x1b[H\x1b]0;{MARK}\x07\x1b[31m",
    f"\x1b]8;;http://evil.example\x1b\\{MARK}\x1b]8;;\x1b\\ \x9b31m \x90q{MARK}\x9c",
    f"\r\x08\x7f\x00{MARK}\x0b\x0c",
    f"\u202e{MARK}\u2066 \u200f\u061c \u2028 \u2029 \ufeff \u200b \U000e0041",
    f"[bold red]{MARK}[/bold red] [link=http://evil.example]x[/link] :smile:",
    f'=HYPERLINK("http://evil.example","{MARK}") +cmd|\' /C calc\'!A0 @SUM(1) -2',
    f"<!channel> @everyone <http://evil.example|{MARK}>",
    f"\ud800 {MARK} \udfff",
    "A" * 5000,
]
"""Scripts, ways out of attributes and elements, templates, Markdown, terminal sequences, direction overrides, cells."""


RUNS = "document.documentElement.setAttribute('data-ran','1')"
"""What `pwned()` stands for in a browser."""
CSP = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
NO_PICTURES = """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">"""
SHOWN = "[...document.images].filter(i => i.complete && i.naturalWidth > 99 && i.getClientRects().length > 0).length"
"""How many pictures of a page are decoded, large and in view."""
BARE, BLIND = ", without its policy", ", with a policy against pictures (control)"
NAKED = "the same texts unescaped (control)"

QUIET = (
    "no script runs and no request is made, with the page's own policy, without one and with another; the text is there"
)
PLOTS = "each page, as it was delivered, shows all its plots"
JUDGED = "the judge can fail: unescaped texts run and make requests, and a policy against pictures shows none"


def write_hostile_run(root: Path, payloads: list[str]) -> None:
    """A run folder, with curves, in which the payloads stand wherever text can."""
    with idle_run(root, num_steps=2000):
        pass
    with EventWriter(root / "logs" / "events.jsonl") as events:
        for number, text in enumerate(payloads, start=1):
            events.write("warning", step=1, code=text, message=text)
            recipe: dict[str, Any] = {"rollback_number": number, "learning_rate_factor": 0.5, "data_stream": number}
            events.write("rollback", step=2000, stage="distil", reason=text, from_step=2000, to_step=1999, **recipe)
            events.write("verdict", step=2000, stage="distil", verdict=text, action=text, reason=text, best_step=1000)
        scores = {"bleu": 30.0} | dict.fromkeys(payloads, 1.0)
        events.write("validation", step=1900, stage="distil", scores=scores, teacher_scores=scores, quality_score=0.9,
                     retentions=scores, probes=scores)  # fmt: skip
        events.write("failed", message=" ".join(payloads))
    samples = [dict.fromkeys(("source", "reference", "teacher", "student"), text) for text in payloads]
    final = {"gate": {"passed": False, "failures": payloads, "thresholds": {}}, "samples": samples, "worst": samples}
    (root / "reports").mkdir()
    (root / "reports" / "final_report.json").write_text(json.dumps(final))
    (root / "monitor").mkdir()
    text = "".join(f"t CRITICAL x/y: {payload}\n" for payload in payloads)
    (root / "monitor" / "alerts.log").write_text(text, encoding="utf-8", errors="surrogatepass")


class CountingProxy:
    """Serves one page, answers every request to another host with nothing, and counts those."""

    def __init__(self) -> None:
        self.page = b""
        self.requests: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                is_page = self.path == "/page"
                if not is_page:
                    owner.requests.append(self.path)
                self.send_response(200 if is_page else 204)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.end_headers()
                self.wfile.write(owner.page if is_page else b"")

            do_POST = do_CONNECT = do_GET

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self) -> list[str]:
        """The requests to hosts of the payloads since the last call; a browser has errands of its own."""
        found, self.requests = [path for path in self.requests if "evil.example" in path], []
        return found

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def open_page(browser: Browser, page: Path, proxy: CountingProxy) -> dict[str, Any]:
    """What a browser made of a page: the pictures in it and those that it shows, seen from outside the page."""
    proxy.page = page.read_bytes()
    opened = browser.open(f"http://{proxy.address}/page")
    document = str(opened.evaluate("document.documentElement.outerHTML"))
    found = {
        "ran": opened.evaluate("document.documentElement.hasAttribute('data-ran')"),
        "loaded": proxy.take(),
        "pictures": proxy.page.count(b'src="data:image/png;base64,'),
        "shown": opened.evaluate(SHOWN),
        "has_text": MARK in document or RUNS[:20] in document,
    }
    opened.close()
    return found


def make_variant(page: Path, name: str, policy: str | None) -> Path:
    """A copy of a page with another policy in the place of its own, or without one."""
    text, num_policies = CSP.subn(policy or "", page.read_text(encoding="utf-8"))
    if num_policies != 1:
        raise BenchmarkError(f"{page} has {num_policies} policies")
    variant = page.with_name(f"{name}.html")
    variant.write_text(text, encoding="utf-8")
    return variant


def measure(browser_path: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Open the reports as they were delivered, their variants, and the texts unescaped."""
    from cvm_translator.observe.report import write_report
    from cvm_translator.observe.status_report import write_status_report

    payloads = [text.replace(f"{MARK}()", RUNS) for text in PAYLOADS]
    root = folder / "run"
    write_hostile_run(root, payloads)
    write_status_report(root)
    write_report(root)
    naked = folder / "naked.html"
    body = "".join(f"<p>{text}</p>" for text in payloads)
    naked.write_text(f"<!doctype html><html><body>{body}</body></html>", encoding="utf-8", errors="surrogatepass")
    pages = {}
    for name, page in {
        "status report": root / "monitor/status_report.html",
        "comparison": root / "reports/comparison_report.html",
    }.items():
        pages[name] = page
        pages[f"{name}{BARE}"] = make_variant(page, "bare", None)
        pages[f"{name}{BLIND}"] = make_variant(page, "blind", NO_PICTURES)
    pages[NAKED] = naked
    proxy = CountingProxy()
    try:
        with Browser(browser_path, f"--proxy-server={proxy.address}") as browser:
            return {name: open_page(browser, page, proxy) for name, page in pages.items()}
    finally:
        proxy.close()


def find_failures(pages: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """What each check found wrong; a check that holds has an empty list."""
    reports = {name: found for name, found in pages.items() if name != NAKED}
    delivered = {name: found for name, found in reports.items() if not name.endswith((BARE, BLIND))}
    blind = {name: found for name, found in reports.items() if name.endswith(BLIND)}
    naked = pages[NAKED]
    return {
        QUIET: [
            f"{name}: ran {found['ran']}, loaded {found['loaded']}, has text {found['has_text']}"
            for name, found in reports.items()
            if found["ran"] or found["loaded"] or not found["has_text"]
        ],
        PLOTS: [
            f"{name}: {found['shown']} of {found['pictures']}"
            for name, found in delivered.items()
            if not 0 < found["pictures"] == found["shown"]
        ],
        JUDGED: [
            *(f"{name}: {found['shown']} shown" for name, found in blind.items() if found["shown"]),
            *([] if naked["ran"] and naked["loaded"] else [f"{NAKED}: {naked['ran']}, {naked['loaded']}"]),
        ],
    }


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the table as Markdown."""
    lines = [
        "# Reports full of hostile text in a browser",
        "",
        *evidence.describe_checks(data["failures"]),
        "",
        f"{data['num_payloads']} payloads in every place for text; {html.escape(data['browser'])}.",
        "",
    ]
    rows = [
        [name, "yes" if found["ran"] else "no", len(found["loaded"]), f"{found['shown']} of {found['pictures']}"]
        for name, found in data["pages"].items()
    ]
    return "\n".join([*lines, evidence.markdown_table(["page", "a script ran", "requests", "plots shown"], rows)])


def main() -> int:
    parser = common.build_plain_parser("Open reports full of hostile text in a headless browser.")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    parser.add_argument("--browser", default=found, metavar="PATH", help="a Chromium (default: the one installed)")
    options = parser.parse_args()
    if options.browser is None:
        raise BenchmarkError("no browser found: install chromium, or name one with --browser PATH")
    version = subprocess.run([options.browser, "--version"], capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        pages = measure(options.browser, Path(folder))
    failures = find_failures(pages)
    data = {"browser": version.strip(), "num_payloads": len(PAYLOADS), "pages": pages, "failures": failures}
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
