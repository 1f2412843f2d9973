"""The doors: exit codes, one-line errors, and translation that keeps its lines."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cvm_translator.cli import MAX_LINE_BYTES, find_exit_code, main, translate_stream
from cvm_translator.config import load_config
from cvm_translator.errors import (
    EXIT_CRASHED,
    EXIT_NO_ROOM,
    EXIT_OUT_OF_MEMORY,
    CvmError,
    NoRoomError,
    RunFolderError,
    describe_error,
)
from cvm_translator.pipeline.text import prepare_corpus
from cvm_translator.runs.lock import RunLock

PROGRAM = [sys.executable, "-m", "cvm_translator"]


def run(*arguments: str | Path, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*PROGRAM, *map(str, arguments)], input=data, capture_output=True)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real, tiny, untrained model: what it says is nonsense, that it says a line for each line is not."""
    import torch

    from cvm_translator.config.schema import ModelConfig, TokenizerConfig
    from cvm_translator.corpus.records import Pair
    from cvm_translator.corpus.tokenizer import Tokenizer, train_sentencepiece
    from cvm_translator.models.folder import save_model
    from cvm_translator.models.transformer import CvmTransformer

    folder = tmp_path_factory.mktemp("model")
    pairs = [Pair(source, target, "") for source, target in make_sentences()]
    (folder / "sentencepiece.model").write_bytes(train_sentencepiece(pairs, TokenizerConfig(vocab_size=340)))
    tokenizer = Tokenizer.load(folder / "sentencepiece.model")
    torch.manual_seed(1)
    model = CvmTransformer(
        ModelConfig(dim=16, num_heads=2, feed_forward_dim=32, encoder_layers=1, decoder_layers=1, max_length=64),
        tokenizer.vocab_size,
    )
    save_model(folder / "student" / "float", model, tokenizer, source_language="de", target_language="en")
    return folder / "student"


# --------------------------------------------------------------------------------------------------------- exit codes


@pytest.mark.parametrize(
    ("arguments", "exit_code", "words"),
    [
        (["run", "missing.yaml"], 1, "error: missing.yaml: no such config file"),
        (["start", "missing.yaml"], 1, "error: missing.yaml: no such config file"),
        (["stop", "nowhere"], 3, "error: no run holds nowhere: there is nothing to stop"),
        (["resume", "nowhere"], 1, "error: nowhere is no run folder: it has no config.yaml"),
        (["resume", "nowhere", "--foreground"], 1, "error: nowhere is no run folder: it has no config.yaml"),
        (["translate", "--model", "nowhere"], 1, "error: there is no model folder nowhere"),
        (["translate", "--model", ".", "--runtime", "ctranslate2"], 1, "error: . is no ctranslate2 export"),
        (
            ["export", "--model", "nowhere", "--format", "onnx", "--output", "out"],
            1,
            "there is no model folder nowhere",
        ),
        (["quantize", "--model", "nowhere", "--output", "out"], 1, "error: there is no model folder nowhere"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    exit_code: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert words in captured.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "required: COMMAND"),
        (["distil"], "invalid choice: 'distil'"),
        (["quantize", "--model", "a", "--output", "b", "--method", "magic"], "choose from 'dynamic'"),
        (["quantize", "--model", "a", "--output", "b", "--bits", "3"], "choose from 4, 8, 16"),
        (["quantize", "--model", "a", "--output", "b", "--group-size", "7"], "even number from 2 up, or row"),
        (["quantize", "--model", "a", "--output", "b", "--target-ratio", "6", "--plan", "c"], "not allowed with"),
        (["export", "--model", "a", "--output", "b", "--format", "gguf"], "choose from 'safetensors', 'huggingface', "),
        (
            ["export", "--model", "a", "--output", "b", "--format", "onnx", "--quantization", "int4"],
            "choose from 'float32'",
        ),
        (["export", "--model", "a", "--output", "b", "--format", "onnx", "--max-drop", "-1"], "BLEU from 0 up"),
        (["translate", "--model", "a", "--beam-size", "0"], "invalid number from 1 up value: '0'"),
        (["corpus"], "required: COMMAND"),
    ],
)
def test_wrong_usage_is_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_a_typo_in_a_config_names_the_nearest_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("distillation: {temprature: 2.0}\n")
    assert main(["run", str(config), "--output-dir", str(tmp_path / "out")]) == 1
    assert "distillation.temperature" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_debug_adds_the_traceback_before_or_after_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "run", "missing.yaml"], ["run", "missing.yaml", "--debug"]):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert "Traceback" in error
        assert error.splitlines()[-1].startswith("error: missing.yaml")


class OutOfMemoryError(RuntimeError):
    """As torch names its own."""


@pytest.mark.parametrize(
    ("error", "exit_code", "supervised_exit_code"),
    [
        (CvmError("wrong"), 1, 1),
        (RunFolderError("in use"), 1, 1),
        (KeyError("x"), 1, EXIT_CRASHED),
        (OSError(5, "Input/output error", "file"), 1, EXIT_CRASHED),
        (RuntimeError("shapes differ"), 1, EXIT_CRASHED),
        (NoRoomError("no room"), 1, EXIT_NO_ROOM),
        (OSError(28, "No space left on device", "file"), 1, EXIT_NO_ROOM),
        (MemoryError(), 1, EXIT_OUT_OF_MEMORY),
        (OutOfMemoryError("CUDA"), 1, EXIT_OUT_OF_MEMORY),
        (RuntimeError("CUDA error: out of memory"), 1, EXIT_OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, EXIT_OUT_OF_MEMORY),
    ],
)
def test_only_a_supervisor_is_told_what_a_restart_may_mend(
    error: Exception, exit_code: int, supervised_exit_code: int
) -> None:
    assert find_exit_code(error, has_supervisor=False) == exit_code
    assert find_exit_code(error, has_supervisor=True) == supervised_exit_code


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_no_defect_of_the_program(number: int) -> None:
    for error in (OSError(number, os.strerror(number)), OSError(number, os.strerror(number), "corpus/train.tsv")):
        line = describe_error(error)
        assert re.fullmatch(r"(the disk|corpus/train\.tsv): no room \(.*\): free some space there and .*again", line)


def test_what_an_error_names_cannot_drive_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "no\x1b]0;owned\x07\u202e.yaml"]) == 1
    assert capsys.readouterr().err.startswith("error: no\\x1b]0;owned\\x07\\u202e.yaml: no such config file")


def test_an_unreadable_place_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    config = tmp_path / "config.yaml"
    config.write_text("corpus: {train: [{format: tsv, path: t.tsv}]}\n")
    assert main(["corpus", "build", str(config), "--output-dir", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: File exists\n"


def test_module_and_monitor_script_are_the_program() -> None:
    assert run("--version").stdout.startswith(b"cvm-translator ")
    script = Path(__file__).parent.parent / "monitor_distillation.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True)
    assert done.returncode == 0
    assert b"--once" in done.stdout


def test_status_of_nothing_is_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path), "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["state"] == "never_started"


# ------------------------------------------------------------------------------------------------------------- corpus

SUBJECTS = {
    "Die Datei": "The file",
    "Das Fenster": "The window",
    "Der Ordner": "The folder",
    "Das Konto": "The account",
}
PREDICATES = {
    "wurde gestern von der Verwaltung gelöscht": "was deleted by the administration yesterday",
    "ist für alle Benutzer sichtbar": "is visible to all of the users",
    "kann nicht geöffnet werden": "cannot be opened at this time",
    "muss noch einmal geprüft werden": "has to be checked once more",
}


def make_sentences() -> list[tuple[str, str]]:
    return [(f"{a} {c}.", f"{b} {d}.") for a, b in SUBJECTS.items() for c, d in PREDICATES.items()]


def write_corpus_config(directory: Path) -> Path:
    lines = [f"{source}\t{target}\n" for source, target in make_sentences()]
    (directory / "train.tsv").write_text("".join([*lines, lines[0]]), encoding="utf-8")
    config = directory / "config.yaml"
    config.write_text("corpus: {train: [{format: tsv, path: train.tsv}], validation_size: 2, test_size: 2}\n")
    return config


def test_corpus_build_prints_what_each_filter_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["corpus", "build", str(write_corpus_config(tmp_path)), "--output-dir", str(tmp_path / "run")]
    command += ["--set", "corpus.test_size=3"]
    assert main(command) == 0
    first = capsys.readouterr().out
    numbers = {line.split()[0]: int(line.split()[1]) for line in first.splitlines() if line.startswith("  ")}
    assert (numbers["validation"], numbers["test"]) == (2, 3)
    assert sum(numbers.values()) == 17
    assert (tmp_path / "run" / "corpus" / "train.tsv").read_bytes().count(b"\n") == numbers["train"]
    assert main(command) == 0
    assert capsys.readouterr().out == first


def test_corpus_build_makes_the_corpus_of_a_run(tmp_path: Path) -> None:
    """Whatever the run's seed: the split has its own."""
    config = write_corpus_config(tmp_path)
    options = ["--output-dir", str(tmp_path / "run"), "--set", "seed=99"]
    assert main(["corpus", "build", str(config), *options]) == 0
    told: list[str] = []
    loaded = load_config(config, ["seed=99"])
    assert prepare_corpus(loaded.corpus, tmp_path / "run" / "corpus", Path.cwd(), told.append).reused
    assert len(told) == 1


def test_corpus_build_finds_a_shifted_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each time: a corpus that failed its checks is not taken for a good one by the next start."""
    nouns, kinds = ("Import", "Export", "Server", "Version", "Projekt"), ("Archiv", "Modul", "Format", "Region")
    lines = [f"{noun} {kind} {'x' * (n % 7)}{n}" for n in range(15) for noun in nouns for kind in kinds]
    (tmp_path / "a.de").write_text("\n".join(lines))
    (tmp_path / "a.en").write_text("\n".join(["an extra line", *(f"the {line.lower()}" for line in lines[:-1])]))
    source = "{format: plain, source_path: a.de, target_path: a.en}"
    config = tmp_path / "config.yaml"
    config.write_text(f"corpus: {{train: [{source}], validation_size: 5, test_size: 5}}\n")
    command = ["corpus", "build", str(config), "--output-dir", str(tmp_path / "run")]
    for _ in range(2):
        assert main([*command, "--set", "corpus.cleaning.language_check=false"]) == 1
        assert "the file is shifted by +1" in capsys.readouterr().err


def test_a_run_folder_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write_corpus_config(tmp_path)
    with RunLock(tmp_path / "run" / "run.lock"):
        assert main(["corpus", "build", str(config), "--output-dir", str(tmp_path / "run")]) == 1
    assert f"is in use by process {os.getpid()}" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------- translation


def upper(texts: list[str]) -> list[str]:
    return [text.upper() for text in texts]


def translated(data: bytes) -> bytes:
    output = io.BytesIO()
    translate_stream(io.BytesIO(data), output, upper, "standard input")
    return output.getvalue()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", b""),
        (b"\n", b"\n"),
        (b"a", b"A\n"),
        (b"a\n\n\nb\n", b"A\n\n\nB\n"),
        (b"a\r\nb\r\n", b"A\nB\n"),
        (b"\xef\xbb\xbfa\n", b"A\n"),
        ("ä\u2028ö\x0bü\n".encode(), "Ä Ö Ü\n".encode()),
        (b"x\n" * 100_000, b"X\n" * 100_000),
        (b"y" * MAX_LINE_BYTES + b"\nz", b"Y" * MAX_LINE_BYTES + b"\nZ\n"),
    ],
)
def test_a_line_out_for_a_line_in(data: bytes, expected: bytes) -> None:
    assert translated(data) == expected


def test_a_line_that_is_not_utf8_is_named_after_those_before_it() -> None:
    output = io.BytesIO()
    with pytest.raises(CvmError, match=r"names\.txt, line 3: not valid UTF-8"):
        translate_stream(io.BytesIO(b"a\nb\n\xff\nc\n"), output, upper, "names.txt")
    assert output.getvalue() == b"A\nB\n"


@pytest.mark.parametrize("end", [b"", b"\n", b"\nlast\n"])
def test_a_line_that_is_far_too_long_is_named_and_not_read_to_its_end(end: bytes) -> None:
    output, lines = io.BytesIO(), io.BytesIO(b"a\n" + b"y" * 10_000_000 + end)
    with pytest.raises(CvmError, match=r"names\.txt, line 2: over 100,000 bytes; put each sentence on a line"):
        translate_stream(lines, output, upper, "names.txt")
    assert output.getvalue() == b"A\n"
    assert lines.tell() < 3 * MAX_LINE_BYTES


def test_lines_are_translated_as_they_arrive() -> None:
    """A writer that waits for each answer before its next line gets it."""
    read_end, write_end = os.pipe()
    output = io.BytesIO()

    def answer(texts: list[str]) -> list[str]:
        if texts == ["one"]:
            os.write(write_end, b"two\n")
        else:
            os.close(write_end)
        return upper(texts)

    os.write(write_end, b"one\n")
    with open(read_end, "rb") as stream:
        translate_stream(stream, output, answer, "pipe")
    assert output.getvalue() == b"ONE\nTWO\n"


def test_translate_keeps_its_lines(model_folder: Path) -> None:
    done = run("translate", "--model", model_folder, data="Datei nicht gefunden.\n\nÖffnen\n".encode())
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"\n") == 3
    assert done.stdout.split(b"\n")[1] == b""


LEAVING = """
import argparse, os, signal, sys
from cvm_translator import cli, errors

def stop(options):
    raise errors.Stopped(signal.SIGTERM)

class Parser:
    def parse_args(self, arguments):
        return argparse.Namespace(command=stop)

cli.build_parser = Parser
code = cli.main([])
for number in (signal.SIGTERM, signal.SIGINT):
    os.kill(os.getpid(), number)
sys.exit(code)
"""


def test_a_further_signal_does_not_change_how_a_stopped_process_ends() -> None:
    done = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (143, "stopped by SIGTERM: everything is saved\n")


@pytest.mark.parametrize(("options", "expected"), [([], 7), (["--batch-size", "3"], 3)])
def test_translate_takes_the_runtime_s_batch_size(
    options: list[str], expected: int, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cvm_translator.models.runtimes.native import NativeRuntime

    given = []
    monkeypatch.setattr(NativeRuntime, "best_batch_size", 7)
    monkeypatch.setattr(NativeRuntime, "translate", lambda *_, batch_size, **__: [given.append(batch_size) or "one"])
    (tmp_path / "in.txt").write_text("eins\n")
    assert main(["translate", "--model", str(model_folder), "--input", str(tmp_path / "in.txt"), *options]) == 0
    assert given == [expected]


def test_translate_a_file_with_beams(
    model_folder: Path, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    command = ["translate", "--model", str(model_folder), "--beam-size", "4", "--input"]
    assert main([*command, str(tmp_path / "missing.txt")]) == 1
    assert capfdbinary.readouterr().err == f"error: {tmp_path / 'missing.txt'}: No such file or directory\n".encode()
    (tmp_path / "in.txt").write_bytes(b"eins\r\n\r\n\xff")
    assert main([*command, str(tmp_path / "in.txt")]) == 1
    out, error = capfdbinary.readouterr()
    assert out.count(b"\n") == 2 and out.endswith(b"\n\n")
    assert error.startswith(f"error: {tmp_path / 'in.txt'}, line 3: not valid UTF-8".encode())


def test_quantize_and_export(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, int8 = str(model_folder / "float"), tmp_path / "int8"
    assert main(["quantize", "--model", source, "--method", "dynamic", "--bits", "8", "--output", str(int8)]) == 0
    assert json.loads((int8 / "config.json").read_text())["number_format"] == "int8"
    assert main(["quantize", "--model", str(int8), "--output", str(tmp_path / "again")]) == 1
    assert main(["export", "--model", str(int8), "--format", "safetensors", "--output", str(tmp_path / "copy")]) == 0
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (int8 / "model.safetensors").read_bytes()
    for command in (["quantize"], ["export", "--format", "safetensors"]):
        assert main([*command, "--model", source, "--output", str(int8)]) == 1
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (int8 / "model.safetensors").read_bytes()
    not_judged, *errors = capsys.readouterr().err.splitlines()
    assert not_judged.startswith(f"not judged: {source} belongs to no run; name sentences")
    assert errors == [
        f"error: {int8}: layer embedding is int8 already: give the float model",
        *[f"error: {int8} exists already: remove it or choose another folder"] * 2,
    ]


def test_a_reader_that_leaves_is_no_error(model_folder: Path) -> None:
    with subprocess.Popen(
        [*PROGRAM, "translate", "--model", str(model_folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdout.close()
        process.stdin.write(b"eins\n")
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141
