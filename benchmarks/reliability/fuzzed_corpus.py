"""A hundred thousand lines of garbage among good ones, through the readers and the build of a corpus.

Three sources (tab-separated, JSON Lines, a pair of plain files) are written, in which most lines are damaged in one of
the ways of `DAMAGES`. A process of its own reads and builds them; the same is done with a tenth of the lines. Checked:

- nothing crashes: each source gives one record a line, and the corpus is built;
- every line is accounted for: read is kept, dropped by a named filter, or in the quarantine file with its reason;
- whatever is kept is sound: each line of the splits is UTF-8 with three columns and two texts;
- with the allowed share of malformed rows as it is by default, the corpus is refused;
- memory is flat: ten times the lines take at most 32 MiB more.

    python -m benchmarks.reliability.fuzzed_corpus

It begins anew each time. The program ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from cvm_translator.config.schema import CorpusConfig
from cvm_translator.corpus.build import ROLES, build_corpus
from cvm_translator.corpus.readers import ReaderContext, read_source
from cvm_translator.errors import CorpusError

NAME = "fuzzed_corpus"
DAMAGED_SHARE = 0.7
MAX_LINE_BYTES = 20_000
MISSING_LINES = 7
"""By which one of the plain files is shorter."""
MAX_GROWTH_BYTES = 32 << 20

CRASH = "nothing crashes: each source gives one record a line, and the corpus is built"
COUNTED = "every line is kept, dropped by a named filter, or in quarantine with its reason"
SOUND = "whatever is kept is UTF-8, three columns, two texts"
REFUSED = "with the default share of malformed rows the corpus is refused"
FLAT = f"ten times the lines take at most {MAX_GROWTH_BYTES >> 20} MiB more memory"

SOURCES: dict[str, dict[str, Any]] = {
    "tsv": {"format": "tsv", "path": "fuzzed.tsv"},
    "jsonl": {
        "format": "jsonl",
        "path": "fuzzed.jsonl",
        "source_key": "translation.de",
        "target_key": "translation.en",
    },
    "plain": {"format": "plain", "source_path": "fuzzed.de", "target_path": "fuzzed.en"},
}

# ------------------------------------------------------------------------------------------------------------ good text

GERMAN = "die Datei der Ordner das Fenster öffnet schließt löscht nicht gefunden bitte Größe ändern Straße für %s"
ENGLISH = "the file the folder the window opens closes deletes not found please change size street for %s"


def draw_pair(generator: random.Random) -> tuple[str, str]:
    """Text like a sentence's and its translation's: the same length, words of the language, sometimes a placeholder."""
    num_words = generator.randrange(2, 14)
    sides = (" ".join(generator.choice(words) for _ in range(num_words)) for words in (GERMAN.split(), ENGLISH.split()))
    source, target = (f"{side} {generator.randrange(10**6)}." for side in sides)
    return source, target


# -------------------------------------------------------------------------------------------------------------- damages

Damage = Callable[[random.Random, bytes], bytes]
BAD_UTF8 = (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\xe2\x82", b"\x80", b"\xfe\xff")
ODD_TEXT = (
    "\ufeff", "\u202e", "\u2066", "\u200b", "\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1b[2J", "\x07", "\r", "\x7f",
    "\U000e0041", "🏳️‍🌈", "ﷺ", "\u0301" * 500, "İı", "<script>", "%(x)s{0}", '"', "=1+1", "\ud7ff", "\ufffe", "𝔘𝔫𝔦",
)  # fmt: skip
ODD_JSON = (
    b"null", b"[]", b"{}", b'"text"', b"12", b"NaN", b'{"translation": null}', b'{"translation": {"de": 1, "en": 2}}',
    b'{"translation": {"de": "a", "en": null}}', b'{"translation": {"de": "\\ud800 x", "en": "y z"}}', b"[" * 5000,
    b'{"translation": {"de": "", "en": "a"}}', b'{"translation": {"de": "a\\u0000b", "en": "c"}}', b"1" + b"0" * 6000,
    b'{"translation.de": "punkt", "translation.en": "dot"}', b'{"a":' * 2000,
    b'{"translation": {"de": ["x"], "en": {}}}',
)  # fmt: skip


def insert(generator: random.Random, line: bytes, what: bytes) -> bytes:
    place = generator.randrange(len(line) + 1)
    return line[:place] + what + line[place:]


def flip_bits(generator: random.Random, line: bytes) -> bytes:
    changed = bytearray(line)
    for _ in range(generator.randrange(1, 4)):
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return bytes(changed)


DAMAGES: dict[str, Damage] = {
    "noise": lambda generator, line: generator.randbytes(generator.randrange(200)),
    "flipped bits": flip_bits,
    "cut short": lambda generator, line: line[: generator.randrange(len(line))],
    "bad UTF-8": lambda generator, line: insert(generator, line, generator.choice(BAD_UTF8)),
    "NUL": lambda generator, line: insert(generator, line, b"\0"),
    "tabs": lambda generator, line: insert(generator, line, b"\t" * generator.randrange(1, 5)),
    "no tab": lambda generator, line: line.replace(b"\t", b" "),
    "empty": lambda generator, line: b"",
    "blank": lambda generator, line: generator.choice([b" ", b"\t", b" \t ", b"\t\t\t", "\u3000\t\u00a0".encode()]),
    "odd text": lambda generator, line: insert(
        generator, line, generator.choice(ODD_TEXT).encode("utf-8", "surrogatepass")
    ),
    "too long": lambda generator, line: line * (MAX_LINE_BYTES * generator.randrange(1, 4) // len(line) + 1),
    "UTF-16": lambda generator, line: line.decode().encode("utf-16"),
    "odd JSON": lambda generator, line: generator.choice(ODD_JSON),
}


def draw_lines(generator: random.Random, num_lines: int, form: Callable[[str, str], bytes]) -> Iterator[bytes]:
    """Lines, most of them damaged; a damage that made a line break is undone, so that lines can be counted."""
    names = list(DAMAGES)
    # Long lines are rare, as they are in files; their share of the bytes is large nevertheless.
    weights = [0.05 if name == "too long" else 1.0 for name in names]
    for _ in range(num_lines):
        line = form(*draw_pair(generator))
        if generator.random() < DAMAGED_SHARE:
            line = DAMAGES[generator.choices(names, weights)[0]](generator, line)
        yield line.replace(b"\n", b" ")


def write_sources(folder: Path, num_lines: int, seed: int) -> dict[str, int]:
    """The three sources, so many lines together; how many rows each must give. The last lines end without a newline."""
    folder.mkdir(parents=True)
    generator, share = random.Random(seed), num_lines // 3
    forms: dict[str, Callable[[str, str], bytes]] = {
        "fuzzed.tsv": lambda source, target: f"{source}\t{target}".encode(),
        "fuzzed.jsonl": lambda source, target: json.dumps({"translation": {"de": source, "en": target}}).encode(),
        "fuzzed.de": lambda source, target: source.encode(),
        "fuzzed.en": lambda source, target: target.encode(),
    }
    for name, form in forms.items():
        count = share - MISSING_LINES if name == "fuzzed.en" else share
        lines = list(draw_lines(generator, count - 1, form))
        (folder / name).write_bytes(b"\n".join([*lines, form("Letzte Zeile ohne Ende.", "Last line without an end.")]))
    return dict.fromkeys(SOURCES, share)


# ------------------------------------------------------------------------------------------------------------- reading


def build_config(**cleaning: Any) -> CorpusConfig:
    sizes = {"validation_size": 20, "test_size": 20}
    rules = {"max_line_bytes": MAX_LINE_BYTES, **cleaning}
    return CorpusConfig.model_validate({"train": list(SOURCES.values()), "cleaning": rules, **sizes})


def read_and_build(folder: Path) -> dict[str, Any]:
    """In a process of its own: what the readers and the build make of the sources, and the memory that it took."""
    context = ReaderContext("de", "en", folder, folder / "cache", MAX_LINE_BYTES, lambda line: None)
    num_records = {
        name: sum(1 for _ in read_source(source, context))
        for name, source in zip(SOURCES, build_config().train, strict=True)
    }
    start = time.monotonic()
    config = build_config(max_quarantine_share=1.0)
    build_corpus(config, folder / "corpus", seed=13, base_dir=folder, report=lambda line: None)
    seconds = time.monotonic() - start
    refusal = ""
    try:
        build_corpus(build_config(), folder / "refused", seed=13, base_dir=folder, report=lambda line: None)
    except CorpusError as error:
        refusal = str(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"num_records": num_records, "refusal": refusal, "peak_bytes": peak, "seconds": seconds}


def find_unsound(corpus: Path) -> list[str]:
    """Lines of the splits that are not what they must be."""
    unsound = []
    for role in ROLES:
        for number, line in enumerate((corpus / f"{role}.tsv").read_bytes().split(b"\n")[:-1], start=1):
            try:
                columns = line.decode("utf-8").split("\t")
            except UnicodeDecodeError as error:
                unsound.append(f"{role}.tsv:{number}: {error}")
                continue
            if len(columns) != 3 or not all(column.strip() for column in columns):
                unsound.append(f"{role}.tsv:{number}: {len(columns)} columns")
    return unsound


def find_uncounted(corpus: Path, expected: Mapping[str, int]) -> list[str]:
    """Sources whose rows do not add up, and reasons of which the quarantine file has another number."""
    filters = json.loads((corpus / "filters.json").read_text(encoding="utf-8"))
    wrong = []
    for (name, num_rows), tally in zip(expected.items(), filters["sources"], strict=True):
        parts = sum(tally["dropped"].values()), sum(tally["quarantined"].values()), tally["num_kept"]
        if tally["num_read"] != num_rows or sum(parts) != num_rows:
            wrong.append(f"{name}: {num_rows} lines, {tally['num_read']} read, {parts} dropped, quarantined, kept")
    _, *rows = (corpus / "quarantine.tsv").read_text(encoding="utf-8").split("\n")[:-1]
    reasons = Counter(row.split("\t")[1] for row in rows)
    if dict(reasons) != filters["quarantine"]:
        wrong.append(f"quarantine.tsv has {dict(reasons)}, counted are {filters['quarantine']}")
    return wrong


# ------------------------------------------------------------------------------------------------------------- program


def run_once(folder: Path, num_lines: int, seed: int, failures: dict[str, list[str]]) -> dict[str, Any]:
    """Write, read and build so many lines, and check what came of it."""
    expected = write_sources(folder, num_lines, seed)
    try:
        told = common.ask_worker(
            "the build", ["benchmarks.reliability.fuzzed_corpus", "--build", str(folder)], os.environ
        )
    except common.BenchmarkError as error:
        failures[CRASH].append(str(error))
        return {"peak_bytes": 0, "seconds": 0.0, "filters": {}}
    data: dict[str, Any] = json.loads(told)
    failures[CRASH] += [
        f"{name}: {data['num_records'][name]} records of {num_rows} lines"
        for name, num_rows in expected.items()
        if data["num_records"][name] != num_rows
    ]
    failures[COUNTED] += find_uncounted(folder / "corpus", expected)
    failures[SOUND] += find_unsound(folder / "corpus")
    if "max_quarantine_share" not in data["refusal"]:
        failures[REFUSED].append(data["refusal"] or "it was built")
    data["filters"] = json.loads((folder / "corpus" / "filters.json").read_text(encoding="utf-8"))
    data["num_lines"] = sum(expected.values())
    return data


def run_benchmark(options: Namespace) -> dict[str, Any]:
    work = options.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    failures: dict[str, list[str]] = {CRASH: [], COUNTED: [], SOUND: [], REFUSED: [], FLAT: []}
    few = run_once(work / "few", options.lines // 10, options.seed, failures)
    many = run_once(work / "many", options.lines, options.seed + 1, failures)
    growth = many["peak_bytes"] - few["peak_bytes"]
    if growth > MAX_GROWTH_BYTES:
        failures[FLAT].append(f"{growth / 2**20:.0f} MiB")
    shutil.rmtree(work)
    return {"seed": options.seed, "few": few, "many": many, "growth_bytes": growth, "failures": failures}


def format_results(data: Mapping[str, Any]) -> str:
    """The checks and the counts as Markdown."""
    many, filters = data["many"], data["many"]["filters"]
    lines = ["# A corpus full of garbage", "", *evidence.describe_checks(data["failures"])]
    if not filters:
        return "\n".join(lines)
    quarantined, dropped = filters["quarantine"], filters["total"]
    lines += [
        "",
        f"{many['num_lines']:,} lines in three sources, built in {many['seconds']:.0f} s:"
        f" {sum(quarantined.values()):,} in quarantine, {sum(dropped.values()):,} dropped,"
        f" {sum(filters['sizes'].values()):,} kept. Peak memory {many['peak_bytes'] / 2**20:.0f} MiB,"
        f" {data['growth_bytes'] / 2**20:+.0f} MiB against a tenth of the lines.",
        "",
    ]
    rows = [[kind, name, f"{count:,}"] for kind, counts in (("quarantine", quarantined), ("dropped", dropped))
            for name, count in counts.items()]  # fmt: skip
    return "\n".join([*lines, evidence.markdown_table(["", "reason", "lines"], rows)])


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Build a corpus out of lines most of which are damaged.")
    parser.add_argument("--lines", type=int, default=100_000, metavar="N", help="over all sources")
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--work", type=Path, default=common.RESULTS / "work" / NAME)
    parser.add_argument("--build", type=Path, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    options = build_parser().parse_args()
    if options.build:
        print(json.dumps(read_and_build(options.build)))
        return 0
    data = run_benchmark(options)
    return evidence.conclude(options.results, NAME, data, format_results(data))


if __name__ == "__main__":
    if sys.platform == "win32":
        sys.exit("error: this benchmark measures memory by getrusage: run it on Linux or macOS")
    common.run_main(main)
