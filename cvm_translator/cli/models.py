"""The commands on models, corpora and reports."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from cvm_translator.cli.tell import tell
from cvm_translator.errors import EXIT_OK, CvmError

Options = argparse.Namespace

CHUNK_BYTES = 1 << 16
"""At most so much text is translated together."""

MAX_LINE_BYTES = 100_000
"""A longer line is no sentence: translated in pieces, it would hold up all others for minutes."""


def report(options: Options) -> int:
    from cvm_translator.observe.report import write_report

    print(write_report(options.run_dir))
    return EXIT_OK


def validate(options: Options) -> int:
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
        tell(f"warning: {name} has no score: {reason}")
    return EXIT_OK


def translate(options: Options) -> int:
    from cvm_translator.models.runtimes import RuntimeSettings, load_runtime

    runtime = load_runtime(options.runtime, options.model, RuntimeSettings(precision=options.precision))
    batch_size = options.batch_size or runtime.best_batch_size

    def translate(texts: list[str]) -> list[str]:
        return runtime.translate(texts, beam_size=options.beam_size, batch_size=batch_size)

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


def quantize(options: Options) -> int:
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
    comparison = quantize_folder(request, tell)
    if comparison is not None:
        print(format_comparison(comparison))
    print(options.output)
    return EXIT_OK


def export(options: Options) -> int:
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
        full_attention=options.full_attention,
    )
    print(export_model(request))
    return EXIT_OK


def corpus_build(options: Options) -> int:
    from cvm_translator.config import load_config
    from cvm_translator.pipeline.text import prepare_corpus
    from cvm_translator.runs.layout import RunLayout
    from cvm_translator.runs.lock import RunLock

    config = load_config(options.config, options.set, options.output_dir)
    layout = RunLayout(config.output_dir)
    with RunLock(layout.lock):
        summary = prepare_corpus(config.corpus, layout.corpus, Path.cwd(), tell)
    tables = {"pairs": summary.sizes, "dropped by": summary.filters, "quarantined for": summary.quarantine}
    for title, counts in tables.items():
        if counts:
            print(title, *(f"  {name:<32}{count:>9,}" for name, count in counts.items()), sep="\n")
    return EXIT_OK
