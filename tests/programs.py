"""The product's programs as processes of their own, forked from a server that has imported the libraries once.

That spares each process the seconds of the imports. Nothing else is shared: what a process knows it has from its
arguments and from files, and a signal or a crash hits it alone.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

PRELOADED = ["cvm_translator.cli", "cvm_translator.pipeline", "cvm_translator.observe.plots", "tests.programs"]
PRELOADED += ["torch._dynamo", "sacrebleu"]  # which an optimizer and a metric import when they are made
# What a command starts in a fresh interpreter and waits for.
FOLLOWED = (["-m", "cvm_translator.pipeline.measure"], ["-m", "cvm_translator", "report"])

_run_really = subprocess.run
_server: Any = forkserver._forkserver


def launch(module: str, arguments: Sequence[str], output: Path, errors: Path, folder: Path) -> Any:
    """Start `python -m MODULE ARGUMENTS` in a folder; returns a process of `multiprocessing`."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    _server.ensure_running()
    started = (_server._forkserver_address, module, list(arguments), output, errors, folder)
    process = server.Process(target=_become, args=started)
    process.start()
    return process


def _become(address: str, module: str, arguments: list[str], output: Path, errors: Path, folder: Path) -> None:
    _server._forkserver_address = address  # its own children come from the same server, not from one of its own
    _server.ensure_running = lambda: None
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    os.chdir(folder)
    sys.argv = [module, *arguments]
    subprocess.run = run_forked
    warnings.filterwarnings("ignore", ".*found in sys.modules after import of package", RuntimeWarning)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def run_forked(command: Any, **options: Any) -> Any:
    """`subprocess.run`, but what one of our commands starts in a fresh interpreter is forked from the server."""
    if [sys.executable, *FOLLOWED[0]] != command[:3] and [sys.executable, *FOLLOWED[1]] != command[:4]:
        return _run_really(command, **options)
    assert options == {"capture_output": True, "text": True, "check": False}
    with tempfile.TemporaryDirectory() as scratch:
        output, errors = Path(scratch) / "output", Path(scratch) / "errors"
        process = launch(command[2], command[3:], output, errors, Path.cwd())
        process.join()
        return subprocess.CompletedProcess(command, process.exitcode, output.read_text(), errors.read_text())
