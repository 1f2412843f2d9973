"""Alerts reach webhooks and commands, late if need be, once; and what is secret is seen nowhere."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cvm_translator.cli import main as command_line
from cvm_translator.errors import ConfigError
from cvm_translator.observe import delivery, targets
from cvm_translator.observe.alerts import Alert, AlertBook
from cvm_translator.observe.delivery import Deliveries, build_payload
from cvm_translator.observe.monitor import main
from cvm_translator.observe.status import read_status
from cvm_translator.observe.targets import DeliveryError, Target, TargetOptions, build_targets
from cvm_translator.runs import secrets
from cvm_translator.runs.events import EventWriter

CANARY = "/services/T0CANARY77/cAnArYtOkEn0123456789?key=QueryCanary42"
STATUS: dict[str, Any] = {"run_dir": "/runs/a", "run_id": "r1", "state": "running", "stage": "distil", "step": 7}


def _load_server() -> Any:
    import importlib.util

    spec = importlib.util.spec_from_file_location("webhook", Path(__file__).with_name("webhook.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.WebhookServer


@pytest.fixture
def server() -> Iterator[Any]:
    running = _load_server()(CANARY)
    yield running
    running.close()


@pytest.fixture(autouse=True)
def _quick_and_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_needles", [])
    monkeypatch.setattr(delivery, "FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(delivery, "MAX_DELAY_SECONDS", 0.05)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def alert(number: int, message: str = "something") -> Alert:
    return Alert(f"rollback/{number}", "WARNING", message, "2026-03-01T08:00:00+00:00")


def wait_for(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def wait_until_all_threads_have_left() -> None:
    """An alert that is on its way when a monitor leaves may still arrive, and would be sent again."""
    wait_for(lambda: not any(thread.name.startswith("alerts to") for thread in threading.enumerate()))


def webhook(url: str, monkeypatch: pytest.MonkeyPatch) -> list[Target]:
    monkeypatch.setenv("HOOK", url)
    return build_targets(TargetOptions(webhook_url_env=["HOOK"]))


def opened(path: Path, found: list[Target]) -> Deliveries:
    deliveries = Deliveries(path / "deliveries.jsonl", found)
    deliveries.open()
    return deliveries


# ------------------------------------------------------------------------------------------------------------- webhooks


def test_a_server_that_fails_first_gets_all_in_order_once(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers = [500, 503, 429, 302, lambda handler: handler.connection.close(), 408]
    deliveries = opened(tmp_path, webhook(server.url, monkeypatch))
    deliveries.queue([alert(1), alert(2)], STATUS)
    deliveries.queue([alert(2), alert(3)], STATUS)
    wait_for(lambda: len(server.taken) == 3)
    assert deliveries.close(30.0) == []
    assert server.keys == ["rollback/1", "rollback/2", "rollback/3"]
    assert server.num_requests == 9
    assert server.headers["Content-Type"] == "application/json"
    assert server.headers["Idempotency-Key"] == "rollback/3"
    assert server.taken[0] | STATUS == server.taken[0]
    assert (server.taken[0]["alert"], server.taken[0]["level"]) == ("rollback", "WARNING")


@pytest.mark.parametrize("code", [400, 401, 404, 410])
def test_an_alert_that_is_refused_for_good_is_set_aside(
    code: int, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stands in nobody's way, is told of once, and is not sent again by the next monitor."""
    server.answers = [408, 429, code]
    found = webhook(server.url, monkeypatch)
    deliveries = opened(tmp_path, found)
    deliveries.queue([alert(1), alert(2)], STATUS)
    wait_for(lambda: server.keys == ["rollback/2"])
    assert server.num_requests == 4
    (told,) = deliveries.find_failures()
    assert (told.key, told.level) == ("refused/webhook_$HOOK/rollback/1", "WARNING")
    assert told.message == f"webhook $HOOK refused the alert rollback/1: it answered HTTP {code}; it is set aside"
    book = AlertBook(tmp_path / "monitor" / "alerts.log")
    assert len(book.tell(deliveries.find_failures())) == 1 and book.tell(deliveries.find_failures()) == []
    (line,) = deliveries.close(30.0)
    assert line.startswith(f"webhook $HOOK has refused alerts (1, the last since it answered HTTP {code})")
    notes = [json.loads(line) for line in (tmp_path / "deliveries.jsonl").read_text().splitlines()]
    assert [note["key"] for note in notes if "refused" in note] == ["rollback/1"]
    again = opened(tmp_path, found)
    again.queue([alert(1)], STATUS)
    assert again.close(30.0) == []
    assert server.num_requests == 4


def test_what_was_not_taken_is_sent_by_the_next_monitor_and_nothing_twice(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = webhook(server.url, monkeypatch)
    first = opened(tmp_path, found)
    first.queue([alert(1)], STATUS)
    wait_for(lambda: server.keys == ["rollback/1"])
    assert first.close(30.0) == []
    second = opened(tmp_path, found)
    server.answers = [500] * 10_000
    second.queue([alert(1), alert(2), alert(3)], STATUS)
    wait_for(lambda: server.num_requests >= 3)
    (left,) = second.close(0.0)
    assert left == "webhook $HOOK has not taken all alerts (2 left): the next monitor sends them"
    wait_until_all_threads_have_left()
    server.answers = []
    with open(tmp_path / "deliveries.jsonl", "a") as ledger:
        ledger.write('{"target": "webhook $HOOK", "key": "torn')
    third = opened(tmp_path, found)
    third.queue([alert(1), alert(2), alert(4)], STATUS)
    wait_for(lambda: len(server.taken) >= 4)
    assert third.close(30.0) == []
    assert server.keys == [f"rollback/{number}" for number in (1, 2, 3, 4)]
    fourth = opened(tmp_path, found)
    assert all(not lane.waiting for lane in fourth.lanes)
    assert fourth.close(0.0) == []


def test_a_target_that_does_not_answer_blocks_nobody(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()
    slow = Target("slow", lambda payload: (held.wait(60), None)[1])
    deliveries = opened(tmp_path, [slow, *webhook(server.url, monkeypatch)])
    start = time.monotonic()
    deliveries.queue([alert(1)], STATUS)
    assert time.monotonic() - start < 10.0
    wait_for(lambda: server.keys == ["rollback/1"])
    wait_for(lambda: not deliveries.lanes[1].waiting)
    assert deliveries.close(0.0) == ["slow has not taken all alerts (1 left): the next monitor sends them"]
    held.set()


def test_of_two_monitors_the_first_delivers(server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = webhook(server.url, monkeypatch)
    first, second = opened(tmp_path, found), opened(tmp_path, found)
    assert first.notice is None and "another monitor" in str(second.notice)
    for monitor in (first, second):
        monitor.queue([alert(1)], STATUS)
    wait_for(lambda: len(server.taken) == 1)
    assert first.close(30.0) == [] and second.close(0.0) == []
    assert len(server.taken) == 1


def test_a_failing_target_is_told_to_the_log_once_an_hour(tmp_path: Path) -> None:
    def refuse(payload: Any) -> None:
        raise DeliveryError("it answered HTTP 500")

    deliveries = opened(tmp_path, [Target("webhook $HOOK", refuse)])
    assert deliveries.find_failures() == []
    deliveries.queue([alert(1)], STATUS)
    wait_for(lambda: deliveries.find_failures() != [])
    (told,) = deliveries.find_failures()
    assert told.message == "webhook $HOOK does not take alerts: it answered HTTP 500; left to send: 1"
    assert " " not in told.key
    deliveries.close(0.0)


def test_an_answer_that_asks_for_patience_is_heeded(
    server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(handler: Any) -> None:
        handler.send_response(429)
        handler.send_header("Retry-After", "0.5")
        handler.end_headers()

    server.answers = [busy]
    (target,) = webhook(server.url, monkeypatch)
    with pytest.raises(DeliveryError, match="HTTP 429") as error:
        target.send(build_payload(alert(1), STATUS))
    assert error.value.retry_after_seconds == 0.5
    server.answers = [busy]
    deliveries = opened(tmp_path, [target])
    start = time.monotonic()
    deliveries.queue([alert(1)], STATUS)
    wait_for(lambda: len(server.taken) == 1)
    assert time.monotonic() - start >= 0.5
    deliveries.close(5.0)


# ------------------------------------------------------------------------------------------------------------- commands


def write_program(path: Path, body: str) -> str:
    path.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_command_gets_the_alert_without_a_shell_and_without_the_urls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOOK", f"http://127.0.0.1:9{CANARY}")
    body = "print(json.dumps([sys.argv[1:], json.load(sys.stdin), 'HOOK' in os.environ]), file=open(sys.argv[1], 'w'))"
    program, out = write_program(tmp_path / "tell", body), tmp_path / "out put"
    command = f"{program} '{out}' '$(touch {tmp_path}/ran)' ';' '*'"
    _, target = build_targets(TargetOptions(webhook_url_env=["HOOK"], alert_command=[command]))
    target.send(build_payload(alert(1, "a <b> $(touch x)"), STATUS))
    arguments, payload, sees_url = json.loads(out.read_text())
    assert arguments == [str(out), f"$(touch {tmp_path}/ran)", ";", "*"]
    assert payload["message"] == "a <b> $(touch x)" and payload["key"] == "rollback/1"
    assert not sees_url and not (tmp_path / "ran").exists()
    assert target.name.startswith("command tell (")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("print('no route', file=sys.stderr); sys.exit(3)", "exit code 3: no route"),
        ("os.kill(os.getpid(), 9)", "exit code -9"),
        ("time.sleep(600)", "and was ended"),
    ],
)
def test_a_command_that_fails_or_hangs(body: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "COMMAND_SECONDS", 1.0 if "sleep" in body else 60.0)
    (target,) = build_targets(TargetOptions(alert_command=[write_program(tmp_path / "tell", body)]))
    with pytest.raises(DeliveryError, match=reason):
        target.send(build_payload(alert(1), STATUS))


def test_a_command_that_is_not_there() -> None:
    (target,) = build_targets(TargetOptions(alert_command=["/no/such/program x"]))
    with pytest.raises(DeliveryError, match="cannot be run"):
        target.send(build_payload(alert(1), STATUS))


# ---------------------------------------------------------------------------------------------------------------- usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--webhook-url-env", "NO_SUCH_HOOK"], "NO_SUCH_HOOK is not set"),
        (["--webhook-url-env", "BAD_HOOK"], "--webhook-url-env: $BAD_HOOK does not hold a webhook's URL"),
        (["--webhook-url-file", "/no/such/file"], "/no/such/file cannot be read"),
        (["--alert-command", "'open"], "--alert-command cannot be split"),
        (["--alert-command", ""], "--alert-command is empty"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("BAD_HOOK", f"ftp://example.org{CANARY}")
    assert command_line(["monitor", str(tmp_path), *arguments]) == 1
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert "canary" not in err.lower()


NO_WEBHOOKS = ["", "https://", "no url", "https://a b/c", "file:///etc/passwd", "https://ex\u00e4mple/x", "http://[/x"]
NO_WEBHOOKS += ["https://user:pa55@example.org/x", "https://example.org:port/x", "https://example.org:0/x"]


@pytest.mark.parametrize("url", NO_WEBHOOKS)
def test_no_url_of_a_webhook(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError):
        webhook(url, monkeypatch)


# -------------------------------------------------------------------------------------------------- the whole monitor


@pytest.mark.parametrize("as_json", [False, True])
def test_a_failing_webhook_leaks_its_url_nowhere(
    as_json: bool,
    server: Any,
    no_plots: None,
    make_run: Callable[..., Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two webhooks (one answers with its own path, one is not there) and events that hold the URL themselves."""
    monkeypatch.setattr("cvm_translator.observe.monitor.LAST_DELIVERY_SECONDS", 0.5)
    monkeypatch.setenv("HOOK", server.url)
    monkeypatch.setenv("DOWN", f"http://127.0.0.1:1{CANARY}")
    root = make_run(until="distil")
    with EventWriter(root / "logs" / "events.jsonl") as events:
        events.write("warning", step=1, code=CANARY, message=f"cannot reach {server.url}")
        events.write("failed", message=f"HTTPError: {server.url} (key QueryCanary42) {CANARY}")
    (root / "logs" / "train.log").write_text(f"said {server.url}\n")
    given = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    server.answers = [500] * 10_000
    options = TargetOptions(webhook_url_env=["HOOK", "DOWN"], alert_command=["false"])
    assert main(root, as_json=as_json, refresh_seconds=0.05, targets=options) == 4
    out, err = capfd.readouterr()
    assert "webhook $HOOK has not taken" in err and "webhook $DOWN has not taken" in err
    written = [path for path in root.rglob("*") if path.is_file() and path not in given]
    assert {path.name for path in written} >= {
        "alerts.log",
        "deliveries.jsonl",
        "status_report.md",
        "status_report.html",
    }
    texts = [out, err, *(path.read_bytes().decode("utf-8", "replace") for path in written)]
    assert [text for text in texts if "canary" in text.lower()] == []
    assert "[redacted]" in out
    wait_until_all_threads_have_left()
    server.answers = []
    monkeypatch.setattr("cvm_translator.observe.monitor.LAST_DELIVERY_SECONDS", 60.0)
    assert main(root, as_json=as_json, refresh_seconds=0.05, targets=TargetOptions(webhook_url_env=["HOOK"])) == 4
    assert [key.split("/")[0] for key in server.keys] == ["degradation", "rollback", "failed"]
    assert "canary" not in json.dumps(server.taken).lower()
    assert main(root, as_json=as_json, refresh_seconds=0.05, targets=TargetOptions(webhook_url_env=["HOOK"])) == 4
    assert len(server.taken) == 3


def test_nothing_is_written_without_targets(no_plots: None, make_run: Callable[..., Path]) -> None:
    root = make_run()
    assert main(root, refresh_seconds=0.05) == 0
    assert not (root / "monitor" / "deliveries.jsonl").exists()
    assert read_status(root)["state"] == "done"
    assert os.path.exists(root / "monitor" / "alerts.log")
