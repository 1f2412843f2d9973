"""The command line's grammar: which options each command takes, and which function it calls."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cvm_translator import __version__
from cvm_translator.cli import models, running
from cvm_translator.runs.control import ACTIONS

Options = argparse.Namespace

DEFAULT_RUN_DIR = Path("distillation_output")
MAX_DROP = "write nothing if more BLEU than this is lost against the float model"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < float("inf"):
        raise ValueError
    return seconds


def _group_size(text: str) -> int | str:
    if text == "row":
        return text
    size = int(text)
    if size < 2 or size % 2:
        raise ValueError
    return size


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65535:
        raise ValueError
    return number


def _bleu(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 100:
        raise ValueError
    return number


# what argparse calls a bad value of theirs
_positive.__name__, _seconds.__name__ = "number from 1 up", "number of seconds above 0"
_group_size.__name__ = "even number from 2 up, or row"
_bleu.__name__, _port.__name__ = "number of BLEU from 0 up", "port from 0 to 65535"


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; each command's function is in `command`."""
    parser = argparse.ArgumentParser(
        prog="cvm-translator", description="Distil large translation models into small ones."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, function: Callable[[Options], int], description: str, within: Any = commands) -> Any:
        command = within.add_parser(name, help=description, description=description[0].upper() + description[1:] + ".")
        command.set_defaults(command=function)
        # SUPPRESS: given before the command's name or after it, it is the same option
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        return command

    for name, function, text in (
        ("run", running.run, "run the whole pipeline, from text to report"),
        ("start", running.start, "run it in the background, supervised"),
    ):
        _add_config(command := add(name, function, text), has_progress=True)
    command.add_argument("--foreground", action="store_true", help="supervise it in this terminal, or as a service")
    status = add("status", running.status, "show where a run is")
    stop = add("stop", running.stop, "let a background run save and leave")
    resume = add("resume", running.resume, "carry on a run exactly where it was")
    monitor = add("monitor", running.monitor, "watch a run, alert, and write status reports")
    control = add("control", running.control, "ask a run for something at the end of its step")
    control.add_argument("action", choices=ACTIONS, metavar="ACTION", help=", ".join(ACTIONS))
    control.add_argument(
        "--timeout", type=_seconds, default=60.0, metavar="SECONDS", help="how long to wait for the answer (default 60)"
    )
    for command in (status, stop, resume, monitor, control):
        command.add_argument("run_dir", type=Path, nargs="?", default=DEFAULT_RUN_DIR, metavar="RUN_DIR")
    stop.add_argument(
        "--timeout", type=_seconds, default=120.0, metavar="SECONDS", help="how long to wait (default 120)"
    )
    resume.add_argument("--foreground", action="store_true", help="in this terminal")
    resume.add_argument("--no-progress", action="store_true", help="no progress display (in the foreground)")
    status.add_argument("--json", action="store_true", help="as JSON")
    monitor.add_argument("--once", action="store_true", help="print the state and leave, with the exit code of status")
    monitor.add_argument("--json", action="store_true", help="JSON instead of text: one object, or one a line")
    monitor.add_argument(
        "--report-every", type=_seconds, default=300.0, metavar="SECONDS", help="write monitor/status_report so often"
    )
    monitor.add_argument("--refresh", type=_seconds, default=1.0, metavar="SECONDS", help="look at the files so often")
    _add_alert_options(monitor)

    unit = add("service-unit", running.service_unit, "print a systemd unit that keeps a run going")
    _add_config(unit, has_progress=False, metavar="CONFIG|RUN_DIR")
    report = add("report", models.report, "write the comparison report of a run again")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    validate = add("validate", models.validate, "score a model on a test set")
    validate.add_argument("path", type=Path, metavar="RUN_DIR|MODEL_DIR")
    validate.add_argument(
        "--test", type=Path, metavar="TSV", help="source, tab, reference a line (default: the run's own)"
    )
    validate.add_argument("--json", action="store_true", help="as JSON")

    translate = add("translate", models.translate, "translate standard input, a line each, in order")
    translate.add_argument("--input", type=Path, metavar="FILE", help="read this file instead of standard input")
    translate.add_argument("--runtime", choices=["native", "ctranslate2", "onnx", "huggingface"], default="native")
    translate.add_argument(
        "--precision", choices=["float32", "bfloat16"], default="float32", help="of a float model's arithmetic (native)"
    )
    translate.add_argument("--beam-size", type=_positive, default=1, metavar="N")
    translate.add_argument(
        "--batch-size", type=_positive, metavar="N", help="sentences decoded together (64, for ctranslate2 32)"
    )
    quantize = add("quantize", models.quantize, "store a float model with fewer bits")
    quantize.add_argument(
        "--method",
        choices=["dynamic", "static", "weight_only", "mixed", "qat", "progressive"],
        default="dynamic",
        metavar="METHOD",
        help="dynamic (default), static, weight_only or mixed; qat and progressive belong to the training of a run",
    )
    quantize.add_argument("--bits", type=int, choices=[4, 8, 16], help="of the weights (default 8; not for mixed)")
    quantize.add_argument(
        "--group-size", type=_group_size, metavar="N|row", help="weights that share a scale at 4 bits (default 64)"
    )
    quantize.add_argument(
        "--asymmetric", dest="symmetric", action="store_false", default=None, help="4-bit grid with zero points"
    )
    target = quantize.add_mutually_exclusive_group()
    target.add_argument(
        "--target-ratio",
        dest="target_compression_ratio",
        type=float,
        metavar="R",
        help="mixed: float32 bytes over ours",
    )
    target.add_argument("--target-megabytes", type=float, metavar="MB", help="mixed: size of the weights")
    target.add_argument("--plan", type=Path, metavar="FILE", help="mixed: a plan to use as it is")
    quantize.add_argument(
        "--calibration", type=Path, metavar="TSV", help="training pairs to calibrate on (default: the run's)"
    )
    quantize.add_argument(
        "--pairs", type=Path, metavar="TSV", help="pairs to be judged on (default: the run's validation set)"
    )
    quantize.add_argument("--max-drop", type=_bleu, metavar="BLEU", help=f"{MAX_DROP} (default: any)")
    _add_export_options(export := add("export", models.export, "write a model in another format, tried in its runtime"))
    for command in (translate, quantize, export):
        command.add_argument(
            "--model", type=Path, required=True, metavar="DIR", help="model folder, or a run's student folder"
        )
    for command in (quantize, export):
        command.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder to write")

    corpus = commands.add_parser("corpus", help="only the corpus stage", description="Only the corpus stage.")
    corpus_commands = corpus.add_subparsers(metavar="COMMAND", required=True)
    _add_config(
        add("build", models.corpus_build, "read, clean and split the text", corpus_commands), has_progress=False
    )
    return parser


def _add_alert_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--webhook-url-env",
        action="append",
        default=[],
        metavar="NAME",
        help="send alerts to the webhook whose URL is in this environment variable; repeatable",
    )
    command.add_argument(
        "--webhook-url-file",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="the same, with the URL in a file; repeatable",
    )
    command.add_argument(
        "--alert-command",
        action="append",
        default=[],
        metavar="COMMAND",
        help="run this without a shell for each alert, the alert as JSON on its standard input; repeatable",
    )
    command.add_argument("--metrics-port", type=_port, metavar="N", help="offer metrics to Prometheus (0: a free port)")
    command.add_argument("--metrics-host", default="127.0.0.1", metavar="ADDRESS", help="where (default 127.0.0.1)")


def _add_export_options(command: argparse.ArgumentParser) -> None:
    formats = ["safetensors", "huggingface", "ctranslate2", "argos", "onnx"]
    command.add_argument("--format", choices=formats, required=True)
    command.add_argument("--quantization", choices=["float32", "int8"], help="default: int8 where the format has it")
    command.add_argument(
        "--vocabulary-map",
        action=argparse.BooleanOptionalAction,
        help="ctranslate2: faster decoding, learnt from the corpus (default: for int8 where a corpus is known)",
    )
    command.add_argument(
        "--corpus", type=Path, metavar="RUN_DIR|TSV", help="text for the vocabulary map (default: the model's own run)"
    )
    command.add_argument(
        "--sentences",
        type=Path,
        metavar="FILE",
        help="what the export is tried on: a sentence a line, with tab and reference where known "
        "(default: the run's validation set, or built-in sentences)",
    )
    command.add_argument(
        "--num-sentences",
        type=_positive,
        metavar="N",
        help="at most so many of them (default: all that have references, else 200)",
    )
    command.add_argument(
        "--max-drop", type=_bleu, metavar="BLEU", help=f"{MAX_DROP} (default: 0.5; any for safetensors, a copy)"
    )
    command.add_argument(
        "--full-attention", action="store_true", help="export a model with core_capacity without that bound"
    )


def _add_config(command: argparse.ArgumentParser, *, has_progress: bool, metavar: str = "CONFIG") -> None:
    command.add_argument("config", type=Path, metavar=metavar, help="YAML file; see configs/")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting; repeatable"
    )
    command.add_argument("--output-dir", type=Path, metavar="DIR", help="run folder (default: the config's output_dir)")
    if has_progress:
        command.add_argument("--no-progress", action="store_true", help="no progress display")
