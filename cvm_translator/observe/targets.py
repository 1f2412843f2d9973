"""Where alerts are sent besides the log and the terminal: webhooks and commands.

Guarantees: a webhook's URL comes from an environment variable or a file and is shown nowhere; a command is run without
a shell, does not see the variables that hold such URLs, and is ended with its children after its time. What cannot be
delivered raises `DeliveryError`, whose text is redacted and fit to be shown. A redirection is not followed: it would
turn the alert into a question, and could carry the URL elsewhere. An answer that says that the alert itself is refused
(HTTP 4xx) is final.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from cvm_translator.errors import ConfigError
from cvm_translator.observe.text import as_number
from cvm_translator.runs.secrets import Secret, read_secret_file, read_secret_variable
from cvm_translator.runs.text import printable

WEBHOOK_SECONDS = 10.0
COMMAND_SECONDS = 30.0
MAX_RETRY_AFTER_SECONDS = 300.0
BUSY_CODES = (408, 429)
"""Answers of the 400s that may be another one later: timeout, too many requests."""

Payload = Mapping[str, Any]


class DeliveryError(Exception):
    """An alert was not taken.

    `retry_after_seconds` is how long the other side asked to be left alone; `is_final` says that it will never take
    this alert.
    """

    def __init__(self, message: str, retry_after_seconds: float = 0.0, *, is_final: bool = False) -> None:
        super().__init__(printable(message))
        self.retry_after_seconds, self.is_final = retry_after_seconds, is_final


@dataclass(frozen=True)
class Target:
    """Somebody who is told of alerts."""

    name: str
    """How it is called in logs, and by which a later monitor knows it again; never the URL."""
    send: Callable[[Payload], None]


@dataclass(frozen=True)
class TargetOptions:
    """The targets as the command line names them."""

    webhook_url_env: Sequence[str] = ()
    webhook_url_file: Sequence[Path] = ()
    alert_command: Sequence[str] = ()


def build_targets(options: TargetOptions) -> list[Target]:
    """Read the URLs and split the commands. Raises ConfigError, which names the option and no secret."""
    secrets = [("--webhook-url-env", read_secret_variable(name)) for name in options.webhook_url_env]
    secrets += [("--webhook-url-file", read_secret_file(Path(path))) for path in options.webhook_url_file]
    targets = {f"webhook {secret.origin}": _build_webhook(option, secret) for option, secret in secrets}
    for text in options.alert_command:
        argv = _split_command(text)
        # The arguments are not shown, since somebody may have put a password there; the digest tells two apart.
        name = f"command {Path(argv[0]).name} ({hashlib.sha256(text.encode()).hexdigest()[:6]})"
        targets[name] = _build_command(argv, frozenset(options.webhook_url_env))
    return [Target(printable(name), send) for name, send in targets.items()]


# ------------------------------------------------------------------------------------------------------------- webhook


class _NoRedirection(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        return None


def _is_webhook(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        has_host = bool(parts.hostname) and parts.username is None and parts.port != 0
    except ValueError:  # a port or an address that is none
        return False
    return parts.scheme in ("http", "https") and has_host and url.isascii() and url.isprintable() and " " not in url


def _build_webhook(option: str, url: Secret) -> Callable[[Payload], None]:
    if not _is_webhook(url.reveal()):
        raise ConfigError(
            f"{option}: {url.origin} does not hold a webhook's URL: that is https:// or http://, a host without user"
            " and password, and a path, in ASCII and without blanks"
        )
    opener = urllib.request.build_opener(_NoRedirection)

    def send(payload: Payload) -> None:
        request = urllib.request.Request(
            url.reveal(),
            data=json.dumps(payload, ensure_ascii=True).encode("ascii"),
            headers={
                "Content-Type": "application/json",
                "User-Agent": "cvm-translator",
                "Idempotency-Key": urllib.parse.quote(str(payload["key"])),
            },
        )
        try:
            with opener.open(request, timeout=WEBHOOK_SECONDS):
                pass
        except urllib.error.HTTPError as error:
            wait = as_number(error.headers.get("Retry-After"))
            error.close()
            is_final = 400 <= error.code < 500 and error.code not in BUSY_CODES
            message = f"it answered HTTP {error.code}"
            raise DeliveryError(message, min(wait, MAX_RETRY_AFTER_SECONDS), is_final=is_final) from None
        except urllib.error.URLError as error:
            raise DeliveryError(f"no connection ({error.reason})") from None
        except (OSError, HTTPException, ValueError) as error:
            raise DeliveryError(f"no answer ({type(error).__name__}: {error})") from None

    return send


# ------------------------------------------------------------------------------------------------------------- command


def _split_command(text: str) -> list[str]:
    try:
        argv = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--alert-command cannot be split ({error}): quote it as for a shell") from None
    if not argv:
        raise ConfigError("--alert-command is empty: name a program and its arguments")
    return argv


def _build_command(argv: Sequence[str], hidden: frozenset[str]) -> Callable[[Payload], None]:
    def send(payload: Payload) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        data = json.dumps(payload, ensure_ascii=True).encode("ascii") + b"\n"
        with tempfile.TemporaryFile() as errors:
            try:
                process = subprocess.Popen(
                    argv, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=errors,
                    start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise DeliveryError(f"it cannot be run ({error.strerror})") from None
            try:
                process.communicate(data, timeout=COMMAND_SECONDS)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                raise DeliveryError(f"it took over {COMMAND_SECONDS:.0f} s and was ended") from None
            if process.returncode != 0:
                raise DeliveryError(f"it ended with exit code {process.returncode}{_last_words(errors)}")

    return send


def _last_words(errors: Any) -> str:
    size = errors.seek(0, os.SEEK_END)
    errors.seek(max(0, size - 2000))
    lines = errors.read().decode("utf-8", "replace").strip().splitlines()
    return f": {lines[-1][-300:]}" if lines else ""
