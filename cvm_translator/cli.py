"""The command line: `cvm-translator COMMAND …`.

Guarantees: an error is one line on standard error that names the setting or file, the value and the remedy, with the
exit code of its kind (1 an error, 2 wrong usage, 3 not running, 4 failed, 5 the gate failed, 130/143 stopped after
saving); `--debug` adds the traceback. Results go to standard output. Libraries are imported by the command that needs
them, so `status`, `start`, `stop` and `monitor` never load torch, and `status`, `stop` and `monitor` no config either.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from cvm_translator import __version__
from cvm_translator.errors import EXIT_ERROR, EXIT_OK, CvmError, Stopped

if TYPE_CHECKING:
    from cvm_translator.config import RunConfig

DEFAULT_RUN_DIR = Path("distillation_output")

CHUNK_BYTES = 1 << 16
"""At most so much text is translated together."""

MAX_LINE_BYTES = 100_000
"""A longer line is no sentence: translated in pieces, it would hold up all others for minutes."""

Options = argparse.Namespace


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Wrong usage leaves through SystemExit with code 2, as argparse does."""
    options = build_parser().parse_args(arguments)
    try:
        exit_code: int = options.command(options)
        sys.stdout.flush()
    except Stopped as stopped:
        _tell(f"stopped by {signal.Signals(stopped.signal_number).name}: everything is saved")
        return stopped.exit_code
    except KeyboardInterrupt:
        _tell("interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader has left (such as head): nothing to tell, and nothing may be written when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        _tell(f"error: {_describe(error)}")
        return error.exit_code if isinstance(error, CvmError) else EXIT_ERROR
    return exit_code


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _describe(error: Exception) -> str:
    """One line for any error; only a CvmError was written for the user to read."""
    if isinstance(error, CvmError):
        return str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text} (this is a defect of the program; --debug shows where)"


# ------------------------------------------------------------------------------------------------------------- running


def _run(options: Options) -> int:
    from cvm_translator.config import load_config

    return _run_pipeline(load_config(options.config, options.set, options.output_dir), options)


def _run_pipeline(config: RunConfig, options: Options) -> int:
    from cvm_translator.pipeline.cards import describe_verdict
    from cvm_translator.pipeline.distiller import run_pipeline

    report = run_pipeline(config, progress=not options.no_progress)
    if options.no_progress:
        print(describe_verdict(report))
    exit_code: int = report["exit_code"]
    return exit_code


def _start(options: Options) -> int:
    from cvm_translator.daemon import start

    _announce(*start(options.config, options.set, options.output_dir))
    return EXIT_OK


def _announce(run_dir: Path, pid: int) -> None:
    print(f"run folder: {run_dir}\nprocess id: {pid}")
    _tell(f"it runs in the background; look at it with: cvm-translator monitor {run_dir}")


def _stop(options: Options) -> int:
    from cvm_translator.daemon import stop

    print(f"process {stop(options.run_dir, options.timeout)} has saved and left {options.run_dir}")
    return EXIT_OK


def _resume(options: Options) -> int:
    from cvm_translator.config import load_config
    from cvm_translator.daemon import resume
    from cvm_translator.daemon.background import require_run_folder
    from cvm_translator.runs.layout import RunLayout

    if options.foreground:
        require_run_folder(options.run_dir)
        return _run_pipeline(load_config(RunLayout(options.run_dir).config, [], options.run_dir), options)
    _announce(*resume(options.run_dir))
    return EXIT_OK


# ------------------------------------------------------------------------------------------------------------ watching


def _status(options: Options) -> int:
    from cvm_translator.observe.describe import format_status
    from cvm_translator.observe.status import read_status

    status = read_status(options.run_dir)
    print(json.dumps(status, indent=2, default=str) if options.json else format_status(status))
    exit_code: int = status["exit_code"]
    return exit_code


def _monitor(options: Options) -> int:
    from cvm_translator.observe.monitor import main as monitor
    from cvm_translator.observe.targets import TargetOptions

    if not options.once:
        os.nice(5)  # a run on a busy machine goes first
    return monitor(
        options.run_dir,
        once=options.once,
        as_json=options.json,
        report_every_seconds=options.report_every,
        refresh_seconds=options.refresh,
        targets=TargetOptions(options.webhook_url_env, options.webhook_url_file, options.alert_command),
        metrics_port=options.metrics_port,
        metrics_host=options.metrics_host,
    )


def _report(options: Options) -> int:
    from cvm_translator.observe.report import write_report

    print(write_report(options.run_dir))
    return EXIT_OK


# -------------------------------------------------------------------------------------------------------------- models


def _validate(options: Options) -> int:
    from cvm_translator.pipeline import validate_model

    result = validate_model(options.path, test=options.test)
    if options.json:
        print(json.dumps(result, indent=2, ensure_ascii=False, default=str))
        return EXIT_OK
    print(f"{result['model']} on {result['test']}, {result['num_sentences']} sentences")
    for name, value in result["scores"].items():
        print(f"  {name:<14}{value:>9.3f}  {result['signatures'].get(name, '')}".rstrip())
    for name, count in result["probes"].items():
        print(f"  {name:<14}{count:>9}")
    for name, reason in result["failures"].items():
        _tell(f"warning: {name} has no score: {reason}")
    return EXIT_OK


def _translate(options: Options) -> int:
    from cvm_translator.models.runtimes import load_runtime

    runtime = load_runtime(options.runtime, options.model)

    def translate(texts: list[str]) -> list[str]:
        return runtime.translate(texts, beam_size=options.beam_size, batch_size=options.batch_size)

    if options.input is None:
        translate_stream(sys.stdin.buffer, sys.stdout.buffer, translate, "standard input")
    else:
        with open(options.input, "rb") as stream:
            translate_stream(stream, sys.stdout.buffer, translate, str(options.input))
    return EXIT_OK


def translate_stream(lines: BinaryIO, output: BinaryIO, translate: Callable[[list[str]], list[str]], name: str) -> None:
    """Translate UTF-8 lines in order, one line out for each line in; empty lines stay empty.

    What has arrived is translated together and written at once, so a slow or interactive writer need not close its end.
    A line that is not UTF-8 or over MAX_LINE_BYTES raises CvmError with its number, after everything before it was
    written; the rest of a long one is not read.
    """
    read = getattr(lines, "read1", lines.read)
    num_lines, rest, at_end = 0, b"", False
    while not at_end:
        data = read(CHUNK_BYTES)
        at_end = not data
        *whole, rest = (rest + data).split(b"\n")
        if rest and (at_end or len(rest) > MAX_LINE_BYTES):
            whole.append(rest)
        texts: list[str] = []
        problem = None
        for line in whole:
            num_lines += 1
            try:
                texts.append(_decode_line(line, is_first=num_lines == 1))
            except ValueError as error:
                problem = CvmError(f"{name}, line {num_lines}: {error}")
                break
        translations = translate(texts) if texts else []
        assert len(translations) == len(texts)
        output.writelines(" ".join(text.splitlines()).encode("utf-8") + b"\n" for text in translations)
        output.flush()
        if problem is not None:
            raise problem


def _decode_line(line: bytes, *, is_first: bool) -> str:
    """The text of a line without its end and, at the beginning of a file, its byte order mark; or why it has none."""
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"over {MAX_LINE_BYTES:,} bytes; put each sentence on a line of its own")
    try:
        return line.decode("utf-8-sig" if is_first else "utf-8").rstrip("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"not valid UTF-8 ({error.reason}); convert it to UTF-8") from None


def _quantize(options: Options) -> int:
    from cvm_translator.config.load import build_quantization
    from cvm_translator.pipeline.comparison import format_comparison
    from cvm_translator.pipeline.quantizing import QuantizeRequest, quantize_folder

    names = ("method", "bits", "group_size", "symmetric", "target_compression_ratio", "target_megabytes", "plan")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    request = QuantizeRequest(
        options.model,
        options.output,
        build_quantization(given),
        calibration=options.calibration,
        pairs=options.pairs,
        max_drop=options.max_drop,
    )
    comparison = quantize_folder(request, _tell)
    if comparison is not None:
        print(format_comparison(comparison))
    print(options.output)
    return EXIT_OK


def _export(options: Options) -> int:
    from cvm_translator.pipeline.export import ExportRequest, export_model

    request = ExportRequest(
        options.model,
        options.format,
        options.output,
        quantization=options.quantization,
        corpus=options.corpus,
        vocabulary_map=options.vocabulary_map,
        sentences=options.sentences,
        num_sentences=options.num_sentences,
        max_drop=options.max_drop,
    )
    print(export_model(request))
    return EXIT_OK


# -------------------------------------------------------------------------------------------------------------- corpus


def _corpus_build(options: Options) -> int:
    from cvm_translator.config import load_config
    from cvm_translator.pipeline.text import prepare_corpus
    from cvm_translator.runs.layout import RunLayout
    from cvm_translator.runs.lock import RunLock

    config = load_config(options.config, options.set, options.output_dir)
    layout = RunLayout(config.output_dir)
    with RunLock(layout.lock):
        summary = prepare_corpus(config.corpus, layout.corpus, Path.cwd(), _tell)
    tables = {"pairs": summary.sizes, "dropped by": summary.filters, "quarantined for": summary.quarantine}
    for title, counts in tables.items():
        if counts:
            print(title, *(f"  {name:<32}{count:>9,}" for name, count in counts.items()), sep="\n")
    return EXIT_OK


# -------------------------------------------------------------------------------------------------------------- parser


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
        ("run", _run, "run the whole pipeline, from text to report"),
        ("start", _start, "run it in the background"),
    ):
        _add_config(add(name, function, text), has_progress=name == "run")
    status = add("status", _status, "show where a run is")
    stop = add("stop", _stop, "let a background run save and leave")
    resume = add("resume", _resume, "carry on a run exactly where it was")
    monitor = add("monitor", _monitor, "watch a run, alert, and write status reports")
    for command in (status, stop, resume, monitor):
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

    report = add("report", _report, "write the comparison report of a run again")
    report.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    validate = add("validate", _validate, "score a model on a test set")
    validate.add_argument("path", type=Path, metavar="RUN_DIR|MODEL_DIR")
    validate.add_argument(
        "--test", type=Path, metavar="TSV", help="source, tab, reference a line (default: the run's own)"
    )
    validate.add_argument("--json", action="store_true", help="as JSON")

    translate = add("translate", _translate, "translate standard input, a line each, in order")
    translate.add_argument("--input", type=Path, metavar="FILE", help="read this file instead of standard input")
    translate.add_argument("--runtime", choices=["native", "ctranslate2", "onnx", "huggingface"], default="native")
    translate.add_argument("--beam-size", type=_positive, default=1, metavar="N")
    translate.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="sentences decoded together")
    quantize = add("quantize", _quantize, "store a float model with fewer bits")
    quantize.add_argument("--method", choices=["dynamic", "static", "weight_only", "mixed"], default="dynamic")
    quantize.add_argument("--bits", type=int, choices=[4, 8, 16], help="of the weights (default 8)")
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
    quantize.add_argument("--max-drop", type=_bleu, metavar="BLEU", help="write nothing if more BLEU is lost")
    _add_export_options(export := add("export", _export, "write a model in another format, tried in its runtime"))
    for command in (translate, quantize, export):
        command.add_argument(
            "--model", type=Path, required=True, metavar="DIR", help="model folder, or a run's student folder"
        )
    for command in (quantize, export):
        command.add_argument("--output", type=Path, required=True, metavar="DIR", help="new folder to write")

    corpus = commands.add_parser("corpus", help="only the corpus stage", description="Only the corpus stage.")
    corpus_commands = corpus.add_subparsers(metavar="COMMAND", required=True)
    _add_config(add("build", _corpus_build, "read, clean and split the text", corpus_commands), has_progress=False)
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
    command.add_argument("--num-sentences", type=_positive, default=200, metavar="N", help="at most so many of them")
    command.add_argument(
        "--max-drop", type=_bleu, default=0.5, metavar="BLEU", help="refuse an int8 export that loses more"
    )


def _add_config(command: argparse.ArgumentParser, *, has_progress: bool) -> None:
    command.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; see configs/")
    command.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting; repeatable"
    )
    command.add_argument("--output-dir", type=Path, metavar="DIR", help="run folder (default: the config's output_dir)")
    if has_progress:
        command.add_argument("--no-progress", action="store_true", help="no progress display")
