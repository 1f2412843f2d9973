"""Argos Translate and LibreTranslate at work: environments of their own, and what they translate with a package.

Guarantees: what they need is installed at the versions of requirements.lock where it has them, and all versions are
recorded; they read and write nothing of the user's, and translate with the package that they were given and no other.
LibreTranslate downloads models when it starts with fewer than two packages, also in place of one that it has, so it is
given its package twice.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import BenchmarkError
from cvm_translator.models.runtimes.base import EXPORT_FILE

ARGOS = ("argostranslate==1.11.0", "torch", "ctranslate2", "sentencepiece")
LIBRETRANSLATE = ("libretranslate==1.9.6", "setuptools<81", "ctranslate2", "sentencepiece")
PINNED = ("torch", "ctranslate2", "sentencepiece")
"""Those that are to be as in requirements.lock, whoever asks for them."""
START_SECONDS, STOP_SECONDS, ANSWER_SECONDS = 120, 10, 600
GREEDY = {"ARGOS_BEAM_SIZE": "1"}

TRANSLATE = """
import json, sys
from argostranslate import package, translate
request = json.load(sys.stdin)
package.install_from_path(request["package"])
languages = {language.code: language for language in translate.get_installed_languages()}
translation = languages[request["source"]].get_translation(languages[request["target"]])
split = translation.underlying.sentencizer.split_sentences
answer = [{"text": translation.translate(line), "sentences": len(split(line))} for line in request["lines"]]
print("\\n" + json.dumps(answer))
"""

INSTALL = """
import json, sys
from argostranslate import package
package.install_from_path(json.load(sys.stdin)["package"])
print("\\n" + json.dumps(True))
"""

FINISH = """
import html, json, sys
from libretranslate.language import improve_translation_formatting as improve
request = json.load(sys.stdin)
texts = [html.unescape(improve(line, text)) for line, text in zip(request["lines"], request["texts"], strict=True)]
print("\\n" + json.dumps(texts))
"""
"""What LibreTranslate does to the text that a model gives it."""


# --------------------------------------------------------------------------------------------------------- environments


@dataclass(frozen=True)
class Environment:
    """A virtual environment that is complete."""

    python: Path
    versions: list[str]
    """As pip freeze gives them."""

    def find_version(self, package: str) -> str | None:
        pairs = (line.partition("==") for line in self.versions)
        found = (number for name, _, number in pairs if number and normalise(name) == normalise(package))
        return next(found, None)


def normalise(package: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


def read_pins() -> dict[str, str]:
    """The lines of requirements.lock by package."""
    lines = (common.REPOSITORY / "requirements.lock").read_text(encoding="utf-8").splitlines()
    return {normalise(line.split("==")[0]): line for line in lines if "==" in line and not line.startswith("#")}


def build_environment(folder: Path, requirements: Sequence[str]) -> Environment:
    """With these packages, names without version at that of requirements.lock. One that is complete is used again."""
    python, stamp, constraints = folder / "bin" / "python", folder / "complete.json", folder / "constraints.txt"
    pins = read_pins()
    asked = {
        "requirements": [pins.get(normalise(name), name) for name in requirements],
        "constraints": [pins[name] for name in PINNED],
    }
    known = json.loads(stamp.read_text(encoding="utf-8")) if stamp.exists() else {}
    if {key: known.get(key) for key in asked} != asked:
        print(f"installing {', '.join(asked['requirements'])} in {folder}", flush=True)
        _call([sys.executable, "-m", "venv", "--clear", str(folder)])
        constraints.write_text("\n".join(asked["constraints"]) + "\n", encoding="utf-8")
        pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
        _call([*pip, "install", "--quiet", "--constraint", str(constraints), *asked["requirements"]])
        known = asked | {"versions": _call([*pip, "freeze"]).splitlines()}
        stamp.write_text(json.dumps(known, indent=2), encoding="utf-8")
    return Environment(python, known["versions"])


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = common.find_last_line(done.stderr.strip() or done.stdout)
        raise BenchmarkError(f"{' '.join(command[:4])} failed: {last}")
    return done.stdout


def isolate(home: Path, settings: Mapping[str, str], environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Surroundings in which nothing of the user's is read or written, with no package installed."""
    shutil.rmtree(home / "argos-translate", ignore_errors=True)
    home.mkdir(parents=True, exist_ok=True)
    theirs = ("PYTHON", "ARGOS_", "LT_", "SNAP")
    kept = {name: value for name, value in environment.items() if not name.startswith(theirs)}
    names = ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")
    return kept | dict.fromkeys(names, str(home.absolute())) | dict(settings)


def _run(what: str, python: Path, program: str, environment: Mapping[str, str], request: Mapping[str, Any]) -> Any:
    """What a program prints last, as JSON."""
    done = subprocess.run(
        [str(python), "-c", program],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
        env=dict(environment),
    )
    if done.returncode != 0:
        raise BenchmarkError(f"{what} failed: {common.find_last_line(done.stderr)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


# --------------------------------------------------------------------------------------------------------- the programs


def translate_with_argos(
    python: Path, package: Path, home: Path, request: Mapping[str, Any], settings: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Text and number of sentences of each line; the settings are Argos Translate's own variables."""
    environment = isolate(home, settings)
    known = {**request, "package": str(package.absolute())}
    answer: list[dict[str, Any]] = _run("Argos Translate", python, TRANSLATE, environment, known)
    return answer


def finish_as_libretranslate(python: Path, home: Path, lines: Sequence[str], texts: Sequence[str]) -> list[str]:
    """Translations as LibreTranslate would show them: with the case and the last punctuation mark of their sources."""
    request = {"lines": list(lines), "texts": list(texts)}
    found: list[str] = _run("LibreTranslate", python, FINISH, isolate(home, {}), request)
    return found


class LibreTranslate:
    """A server on the loopback interface that has one package, for a `with` block."""

    def __init__(self, python: Path, package: Path, home: Path, log: Path, settings: Mapping[str, str]) -> None:
        self._python, self._package, self._home, self._log = python, package, home, log
        self._environment = isolate(home, settings)
        self._installed = home / "argos-translate" / "packages"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]

    def __enter__(self) -> LibreTranslate:
        _run("LibreTranslate", self._python, INSTALL, self._environment, {"package": str(self._package.absolute())})
        (only,) = self._installed.iterdir()
        shutil.copytree(only, only.with_name("again"))
        command = [str(self._python.parent / "libretranslate"), "--host", "127.0.0.1", "--port", str(self._port)]
        with open(self._log, "wb") as stream:
            self._server = subprocess.Popen(
                [*command, "--disable-web-ui"], stdout=stream, stderr=stream, env=self._environment, cwd=self._home
            )
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._server.terminate()
        try:
            self._server.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._server.kill()
            self._server.wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._server.poll() is None:
            try:
                self._ask("languages")
                return
            except OSError:
                time.sleep(0.5)
        raise BenchmarkError(f"LibreTranslate does not answer; {self._describe_log()}")

    def translate(self, request: Mapping[str, Any]) -> list[str]:
        body = {"q": request["lines"], "source": request["source"], "target": request["target"], "format": "text"}
        try:
            answer = self._ask("translate", body)
        except OSError as error:
            raise BenchmarkError(f"LibreTranslate does not translate ({error}); {self._describe_log()}") from error
        foreign = [path.name for path in self._installed.iterdir() if not (path / EXPORT_FILE).is_file()]
        if foreign:
            raise BenchmarkError(f"LibreTranslate has fetched packages of its own: {', '.join(foreign)}; try again")
        texts: list[str] = answer["translatedText"]
        return texts

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        url = f"http://127.0.0.1:{self._port}/{path}"
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
        with opener.open(request, timeout=ANSWER_SECONDS) as response:
            return json.load(response)

    def _describe_log(self) -> str:
        last = common.find_last_line(self._log.read_text(encoding="utf-8", errors="replace"))
        return f"its log {self._log} ends with: {last}"
