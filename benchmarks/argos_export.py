"""Do Argos Translate and LibreTranslate take the package, and say what we say?

Their dependencies are heavy, so each gets an environment of its own, with the versions of requirements.lock where it
has them. The package is installed from its file with no network needed, and translates the first test sentences of a
run. Argos Translate searches with four beams by default; with one it decodes as we do, except that it

- cuts lines into sentences, which we do only where a line is too long,
- writes blanks for underscores,
- has another limit for translations that never end,
- lets CTranslate2 compute in int8 whatever the package holds, unless told otherwise.

So the float32 package with one beam, computed in float32, must agree with the native float32 student on at least 98 %
of the lines to which none of that applies. The int8 package with default settings is compared by BLEU, once as it is
and once with blanks for underscores on all sides.

    python -m benchmarks.argos_export --run distillation_output [--no-libretranslate]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import BenchmarkError
from cvm_translator.corpus.build import load_split
from cvm_translator.metrics import Metric, MetricOptions, build_metrics
from cvm_translator.models.description import load_model_config
from cvm_translator.models.runtimes import RuntimeSettings, load_runtime
from cvm_translator.models.runtimes.base import limit_output
from cvm_translator.pipeline.export import ExportRequest, export_model
from cvm_translator.runs.layout import RunLayout

NAME = "argos_export"
MIN_AGREEMENT, MAX_BLEU_LOSS = 0.98, 0.3
ARGOS = ("argostranslate==1.11.0", "torch", "ctranslate2", "sentencepiece")
"""Names without version take that of requirements.lock."""
LIBRETRANSLATE = ("libretranslate==1.9.6", "setuptools<81")
START_SECONDS = 120

PROGRAM = """
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


# --------------------------------------------------------------------------------------------------------- environments


def build_environment(folder: Path, requirements: Sequence[str]) -> Path:
    """A virtual environment with the packages; returns its Python. One that is complete is used again."""
    python, stamp = folder / "bin" / "python", folder / "complete.json"
    lock = (common.REPOSITORY / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = {line.split("==")[0].lower(): line for line in lock if "==" in line}
    wanted = [pins.get(name, name) for name in requirements]
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return python
    print(f"installing {', '.join(wanted)} in {folder}", flush=True)
    for command in (
        [sys.executable, "-m", "venv", "--clear", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise BenchmarkError(f"{' '.join(command[:4])} failed: {' '.join(last)}")
    stamp.write_text(json.dumps(wanted))
    return python


def isolate(home: Path, **settings: str) -> dict[str, str]:
    """Surroundings in which nothing of the user's is read or written."""
    home.mkdir(parents=True, exist_ok=True)
    names = ("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "ARGOS_"))}
    return kept | dict.fromkeys(names, str(home)) | settings


# -------------------------------------------------------------------------------------------------------------- running


def translate_with_argos(
    python: Path, package: Path, home: Path, request: dict[str, Any], **settings: str
) -> list[dict[str, Any]]:
    """Text and number of sentences of each line; the settings are Argos Translate's own variables."""
    done = subprocess.run(
        [str(python), "-c", PROGRAM],
        input=json.dumps(request | {"package": str(package.absolute())}),
        capture_output=True,
        text=True,
        check=False,
        env=isolate(home, **settings),
    )
    if done.returncode != 0:
        raise BenchmarkError(f"Argos Translate failed: {' '.join(done.stderr.strip().splitlines()[-1:])}")
    answer: list[dict[str, Any]] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def translate_with_libretranslate(
    python: Path, package: Path, home: Path, request: dict[str, Any], log: Path
) -> list[str]:
    """Install the package where LibreTranslate looks, serve it on the loopback interface and ask over HTTP."""
    environment = isolate(home)
    install = f"from argostranslate import package; package.install_from_path({str(package.absolute())!r})"
    subprocess.run([str(python), "-c", install], check=True, capture_output=True, env=environment)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(python.parent / "libretranslate"), "--host", "127.0.0.1", "--port", str(port), "--disable-web-ui"]
    with open(log, "wb") as stream:
        server = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, cwd=home)
    try:
        _wait_for(server, port, log)
        body = {"q": request["lines"], "source": request["source"], "target": request["target"], "format": "text"}
        answer = _post(f"http://127.0.0.1:{port}/translate", body)
        texts: list[str] = answer["translatedText"]
        return texts
    finally:
        server.terminate()
        server.wait()


def _post(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


def _wait_for(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            _post(f"http://127.0.0.1:{port}/languages")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
    raise BenchmarkError(f"LibreTranslate does not answer; its log {log} ends with: {' '.join(last)}")


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    layout = RunLayout(options.run)
    config = load_model_config(layout.student / "float")
    pairs = load_split(layout.corpus, "test")[: options.num_sentences]
    lines, references = [pair.source for pair in pairs], [pair.target for pair in pairs]
    request = {"source": config["source_language"], "target": config["target_language"], "lines": lines}
    options.work.mkdir(parents=True, exist_ok=True)
    packages = {}
    for number_format in ("float32", "int8"):
        packages[number_format] = options.work / f"{number_format}.argosmodel"
        packages[number_format].unlink(missing_ok=True)
        export_model(ExportRequest(layout.student, "argos", packages[number_format], number_format))
    native = {
        name: load_runtime("native", layout.student / folder, RuntimeSettings(num_threads=1))
        for name, folder in (("float32", "float"), ("int8", "int8"))
    }
    ours = {name: runtime.translate(lines) for name, runtime in native.items()}
    texts = {f"native, {name}, greedy": found for name, found in ours.items()}

    python = build_environment(options.work / "argos", ARGOS)
    settings = {"ARGOS_BEAM_SIZE": "1", "ARGOS_COMPUTE_TYPE": "float32"}
    greedy = translate_with_argos(python, packages["float32"], options.work / "home_float32", request, **settings)
    searched = translate_with_argos(python, packages["int8"], options.work / "home_int8", request)
    texts |= {
        "Argos Translate, float32, greedy": [answer["text"] for answer in greedy],
        "Argos Translate, int8, four beams": [answer["text"] for answer in searched],
    }
    if options.libretranslate:
        python = build_environment(options.work / "libretranslate", LIBRETRANSLATE)
        log = options.work / "libretranslate.log"
        texts["LibreTranslate, int8"] = translate_with_libretranslate(
            python, packages["int8"], options.work / "home_libretranslate", request, log
        )
    tokenizer = native["float32"].tokenizer
    is_comparable = [
        answer["sentences"] == 1
        and "_" not in our
        and len(tokenizer.encode([our])[0])
        < limit_output(len(tokenizer.encode([line])[0]), config["model"]["max_length"])
        for line, our, answer in zip(lines, ours["float32"], greedy, strict=True)
    ]
    same = [our.strip() == answer["text"].strip() for our, answer in zip(ours["float32"], greedy, strict=True)]
    (bleu,) = build_metrics(["bleu"], MetricOptions(target_language=request["target"]))
    return {
        "run": str(options.run),
        "requirements": {"argos": list(ARGOS), "libretranslate": list(LIBRETRANSLATE)},
        "num_sentences": len(lines),
        "num_comparable": sum(is_comparable),
        "num_same": sum(same),
        "num_comparable_same": sum(both for both, counts in zip(same, is_comparable, strict=True) if counts),
        "bleu": {name: compute_bleu(bleu, found, references) for name, found in texts.items()},
        "bleu_without_underscores": {
            name: compute_bleu(bleu, *([text.replace("_", " ") for text in side] for side in (found, references)))
            for name, found in texts.items()
        },
        "different": [
            {"source": line, "native": our, "argos": answer["text"]}
            for line, our, answer, alike, counts in zip(
                lines, ours["float32"], greedy, same, is_comparable, strict=True
            )
            if counts and not alike
        ],
    }


def compute_bleu(bleu: Metric, hypotheses: list[str], references: list[str]) -> float:
    return float(bleu.score(bleu.statistics(hypotheses, references).sum(axis=0)))


# -------------------------------------------------------------------------------------------------------------- results


def find_failures(data: Mapping[str, Any]) -> dict[str, list[str]]:
    """What each demand found wrong."""
    agreement = data["num_comparable_same"] / max(1, data["num_comparable"])
    before = data["bleu_without_underscores"]["native, int8, greedy"]
    losses = [
        f"{name}: {before - value:.2f}"
        for name, value in data["bleu_without_underscores"].items()
        if ", int8" in name and before - value > MAX_BLEU_LOSS
    ]
    return {
        f"float32 with one beam translates {MIN_AGREEMENT:.0%} of the comparable lines as the native student": (
            [] if agreement >= MIN_AGREEMENT and data["num_comparable"] else [f"{agreement:.1%}"]
        ),
        f"int8 with the programs' own settings loses at most {MAX_BLEU_LOSS:g} BLEU, underscores aside": losses,
    }


def format_results(data: Mapping[str, Any]) -> str:
    rows = [
        [name, f"{value:.2f}", f"{data['bleu_without_underscores'][name]:.2f}"] for name, value in data["bleu"].items()
    ]
    return "\n".join(
        [
            f"# The .argosmodel package in Argos Translate and LibreTranslate: {data['run']}",
            "",
            f"{data['num_sentences']} test sentences; {data['num_comparable']} of them are one sentence to Argos "
            "Translate, hold no underscore and end before our length limit. Of these the float32 package, decoded "
            f"greedily, translates {data['num_comparable_same']} as the native float32 student does "
            f"({data['num_same']} of all).",
            "",
            evidence.markdown_table(["system", "BLEU", "with blanks for underscores"], rows),
            "",
            *evidence.describe_checks(find_failures(data)),
        ]
    )


def main() -> int:
    parser = common.build_plain_parser("Install a run's student in Argos Translate and LibreTranslate.")
    parser.add_argument("--run", type=Path, default=Path("distillation_output"), metavar="RUN_DIR")
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME, help="environments and packages")
    parser.add_argument("--num-sentences", type=int, default=200, metavar="N")
    parser.add_argument("--libretranslate", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    data = run_benchmark(options)
    data["failures"] = find_failures(data)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    common.run_main(main)
