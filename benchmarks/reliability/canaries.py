"""Secrets that a whole run and its monitor know of: do they stand anywhere afterwards?

A small real run is done under its supervisor, and a real monitor watches it; the trainer is killed once, so that there
is something to alert of. All of them have canary secrets in their environment (an API key, tokens, a password); the
monitor has one webhook's URL from a variable and another's from a file. The first webhook answers with errors that
repeat its own URL, breaks off, redirects and at last takes the alerts; the second is not there; an alert command prints
the second one's URL and fails. Webhooks that cannot be used, and the commands that look at the run, are called as well.
Then everything that was written or printed is searched for the canaries, as they are, quoted and in base 64:

- none stands in the run folder, in temporary files and caches, in what was printed, or in what the webhook was sent;
- the secrets were used: the webhook was asked under its secret path, and took alerts; the command ran.

    python -m benchmarks.reliability.canaries

It begins anew each time. The program ends with 1 if a check fails, or if the search misses a canary that was planted.
"""

from __future__ import annotations

import argparse
import base64
import os
import shlex
import shutil
import signal
import subprocess
import threading
import urllib.parse
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
from benchmarks.reliability import tiny_run
from benchmarks.reliability.supervised import SupervisedRun

NAME = "canaries"
TOKENS = {
    "webhook": "T0CanaryHook7/xWk29qLmZ+webhook",
    "query": "QueryCanary4242",
    "file": "FileCanary88/pQr77tUv=hook",
    "bad": "BadCanary1357",
    "key": "sk-KeyCanary99abcdef",
    "token": "hf_TokenCanary31415",
    "password": "PassCanary/2718+xyz",
}
"""Canaries by where they are put: no such text is written by anybody else."""
ANSWERS = (500, 500, 429, 302, 0, 503)
"""Of the webhook, one after the other; 0 breaks off. Then it takes the alerts."""

ABSENT = "no canary stands in the run folder, in temporary files and caches, or in what was printed or sent"
USED = "the secrets were used: the webhook was asked and took alerts, the command ran"
FOUND = "the search finds every canary that is planted, in every form"


class Webhook:
    """An HTTP server that refuses alerts in several ways before it takes them."""

    def __init__(self, path: str) -> None:
        self.path, self.num_requests = path, 0
        self.taken: list[bytes] = []
        owner, answers = self, list(ANSWERS)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                owner.num_requests += self.path == owner.path
                answer = answers.pop(0) if answers else 200
                if answer == 0:
                    self.connection.close()
                    return
                if answer == 200:
                    owner.taken.append(body + str(dict(self.headers)).encode())
                self.send_response(answer, f"because of {owner.url}")
                self.send_header("Location", f"{owner.url}&again=1")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}{path}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


# ----------------------------------------------------------------------------------------------------------- searching


def list_forms(token: str) -> set[bytes]:
    """How a canary could stand somewhere: as it is, quoted, in parts between slashes, in base 64 at any offset."""
    forms = {token.lower().encode(), urllib.parse.quote(token, safe="").lower().encode()}
    forms |= {part.lower().encode() for part in token.split("/") if "canary" in part.lower()}
    for offset in range(3):
        coded = base64.b64encode(b"x" * offset + token.encode())
        forms.add(coded[4:-4].lower())  # without the ends, which depend on the neighbours
    return forms


NEEDLES = {name: list_forms(token) for name, token in TOKENS.items()}


def find_canaries(data: bytes) -> list[str]:
    lower = data.lower()
    return [name for name, forms in NEEDLES.items() if any(form in lower for form in forms)]


def read_everything(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file, and of each member of an archive."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        yield str(path.relative_to(folder)), path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    yield f"{path.relative_to(folder)}:{member}", archive.read(member)


def check_search(folder: Path) -> list[str]:
    """Plant each canary in each form, and see that it is found."""
    folder.mkdir()
    planted: dict[str, Callable[[str], bytes]] = {
        "plain": lambda token: f"at {token}.".encode(),
        "quoted": lambda token: urllib.parse.quote(token, safe="").encode(),
        "base 64": lambda token: base64.b64encode(f"Authorization: user:{token} and more".encode()),
        "upper case": lambda token: token.upper().encode(),
    }
    missed = []
    for form, make in planted.items():
        for name, token in TOKENS.items():
            (folder / "planted").write_bytes(b"before " + make(token) + b" after")
            missed += (
                [] if any(name in find_canaries(data) for _, data in read_everything(folder)) else [f"{name} {form}"]
            )
    shutil.rmtree(folder)
    return missed


# --------------------------------------------------------------------------------------------------------- what is run


class Stage:
    """The folders, the environment and everything that was printed."""

    def __init__(self, work: Path, hook: str) -> None:
        self.work, self.printed = work, work / "printed"
        for name in ("printed", "home", "tmp"):
            (work / name).mkdir(parents=True)
        self.hook_file = work / "hook.txt"
        self.hook_file.write_text(f"http://127.0.0.1:9/{TOKENS['file']}\n")
        self.environment = {
            "HOOK": hook,
            "BAD_HOOK": f"ftp://hooks.example.org/{TOKENS['bad']}",
            "TEACHER_API_KEY": TOKENS["key"],
            "HF_TOKEN": TOKENS["token"],
            "DATABASE_URL": f"postgresql://user:{TOKENS['password']}@db.example.org/runs",
            "HOME": str(work / "home"),
            "TMPDIR": str(work / "tmp"),
            "CVM_TRANSLATOR_CACHE": str(work / "home" / "cache"),
        }

    def start(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        """A command of the product; what it prints is kept."""
        with open(self.printed / name, "ab") as stream:
            return subprocess.Popen(
                [*common.PROGRAM, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                env=os.environ | {"OMP_NUM_THREADS": "1"} | self.environment,
            )

    def run(self, name: str, *arguments: str) -> None:
        self.start(name, list(arguments)).wait(300)


def run_and_watch(stage: Stage) -> Path:
    """The whole run with its monitor, and the commands that look at it; returns the run folder."""
    arm = tiny_run.build_arm(stage.work, "run", tiny_run.write_config(stage.work / "config", tensorboard=True))
    ran = stage.work / "command_ran"
    command = f'touch {shlex.quote(str(ran))}; echo "$HOOK $(cat {shlex.quote(str(stage.hook_file))})" >&2; exit 3'
    run_dir = str(arm.folder)
    with SupervisedRun(arm, environment=stage.environment) as run:
        options = ["--report-every", "5", "--webhook-url-env", "HOOK", "--webhook-url-file", str(stage.hook_file)]
        options += ["--alert-command", shlex.join(["sh", "-c", command])]
        monitor = stage.start("monitor", ["monitor", run_dir, *options])
        try:
            run.wait_for_save(20)
            os.kill(run.trainer, signal.SIGKILL)
            run.wait_for(lambda event: event["kind"] == "run_started" and len(run.find("run_started")) > 1)
            stage.run("status", "status", run_dir, "--json")
            stage.run("bad webhook", "monitor", run_dir, "--webhook-url-env", "BAD_HOOK", "--debug")
            stage.run("no webhook", "monitor", run_dir, "--webhook-url-env", "NO_SUCH_HOOK")
            run.wait_for(lambda event: event["kind"] == "run_finished")
            monitor.wait(300)
        finally:
            monitor.kill()
            monitor.wait()
    for name, arguments in {"status": ["status", run_dir], "once": ["monitor", run_dir, "--once"]}.items():
        stage.run(name, *arguments)
    stage.run("report", "report", run_dir)
    stage.run("unit", "service-unit", run_dir)
    return arm.folder


def run_benchmark(options: Namespace) -> dict[str, Any]:
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    webhook = Webhook(f"/services/{TOKENS['webhook']}?key={TOKENS['query']}")
    stage = Stage(work, webhook.url)
    try:
        folder = run_and_watch(stage)
    finally:
        webhook.close()
    failures: dict[str, list[str]] = {ABSENT: [], USED: [], FOUND: check_search(work / "search")}
    num_files = num_bytes = 0
    for place in (folder, stage.printed, work / "home", work / "tmp", work / "config"):
        if not place.exists():
            raise BenchmarkError(f"{place} is not there: what should have been searched is missing")
        for name, data in read_everything(place):
            num_files, num_bytes = num_files + 1, num_bytes + len(data)
            failures[ABSENT] += [f"{found} in {place.name}/{name}" for found in find_canaries(data)]
    failures[ABSENT] += [f"{found} in an alert" for body in webhook.taken for found in find_canaries(body)]
    if webhook.num_requests <= len(ANSWERS) or not webhook.taken or not (work / "command_ran").exists():
        failures[USED].append(f"{webhook.num_requests} requests, {len(webhook.taken)} alerts taken")
    return {
        "num_canaries": len(TOKENS),
        "num_files": num_files,
        "num_bytes": num_bytes,
        "num_requests": webhook.num_requests,
        "num_taken": len(webhook.taken),
        "failures": failures,
    }


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the counts as Markdown."""
    return "\n".join(
        [
            "# Canary secrets through a whole run",
            "",
            *evidence.describe_checks(data["failures"]),
            "",
            f"{data['num_canaries']} canaries were looked for in {data['num_files']:,} files and members of archives"
            f" ({data['num_bytes'] / 2**20:.0f} MiB). The webhook was asked {data['num_requests']} times and took"
            f" {data['num_taken']} alerts.",
        ]
    )


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Search everything that a run writes and prints for its secrets.")
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME)
    return parser


def main() -> int:
    options = build_parser().parse_args()
    data = run_benchmark(options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
