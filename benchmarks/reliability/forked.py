"""Commands of the product as processes of their own, forked from a server that has imported the libraries once.

That spares each of them the seconds of the imports. Nothing else is shared: a signal, a kill or a crash hits the one
process, and what it held dies with it.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Forge:
    """Starts commands; `launch` returns a process of `multiprocessing` (pid, is_alive, join, exitcode)."""

    def __init__(self) -> None:
        self._server = multiprocessing.get_context("forkserver")
        self._server.set_forkserver_preload(["cvm_translator.cli", "cvm_translator.pipeline.distiller"])

    def launch(self, arguments: Sequence[str], log: Path) -> Any:
        """Start `cvm-translator ARGUMENTS`; what it prints is appended to the log."""
        log.parent.mkdir(parents=True, exist_ok=True)
        process = self._server.Process(target=become_program, args=(list(arguments), log))
        process.start()
        return process


def become_program(arguments: list[str], log: Path) -> None:
    """In the forked process: the command line, in a session of its own."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    from cvm_translator.cli import main

    sys.argv = ["cvm-translator", *arguments]
    sys.exit(main(arguments))
