"""The command line: `cvm-translator COMMAND …`.

Guarantees: an error is one line on standard error that names the setting or file, the value and the remedy, with the
exit code of its kind (1 an error, 2 wrong usage, 3 not running, 4 failed, 5 the gate failed, 130/143 stopped after
saving); `--debug` adds the traceback. Results go to standard output. Libraries are imported by the command that needs
them, so `status`, `start`, `stop` and `monitor` never load torch, and `status`, `stop` and `monitor` no config either.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

from cvm_translator.cli.memory import keep_freed_memory
from cvm_translator.cli.models import MAX_LINE_BYTES, translate_stream
from cvm_translator.cli.parser import build_parser
from cvm_translator.cli.tell import tell
from cvm_translator.cli.threads import shorten_spinning
from cvm_translator.errors import (
    EXIT_CRASHED,
    EXIT_ERROR,
    EXIT_NO_ROOM,
    EXIT_OUT_OF_MEMORY,
    CvmError,
    Stopped,
    describe_error,
    is_full_disk,
    is_out_of_memory,
)
from cvm_translator.runs.heartbeat import is_supervised

__all__ = ["MAX_LINE_BYTES", "build_parser", "find_exit_code", "main", "translate_stream"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Wrong usage leaves through SystemExit with code 2, as argparse does."""
    shorten_spinning()
    keep_freed_memory()
    options = build_parser().parse_args(arguments)
    has_supervisor = is_supervised()
    try:
        exit_code: int = options.command(options)
        sys.stdout.flush()
    except Stopped as stopped:
        _ignore_signals()
        saved = "everything is saved" if stopped.is_saved else "the steps since the last checkpoint will be repeated"
        tell(f"stopped by {signal.Signals(stopped.signal_number).name}: {saved}")
        return stopped.exit_code
    except KeyboardInterrupt:
        tell("interrupted")
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # The reader has left (such as head): nothing to tell, and nothing may be written when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        tell(f"error: {describe_error(error)}")
        return find_exit_code(error, has_supervisor=has_supervisor)
    return exit_code


def _ignore_signals() -> None:
    """What was to be saved is saved: a further signal must not change how the process ends, nor print a traceback."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)


def find_exit_code(error: Exception, *, has_supervisor: bool) -> int:
    """The exit code of an error; a supervisor is also told what may have passed when the trainer is started again."""
    if has_supervisor and is_full_disk(error):
        return EXIT_NO_ROOM
    if isinstance(error, CvmError):
        return error.exit_code
    if not has_supervisor:
        return EXIT_ERROR
    return EXIT_OUT_OF_MEMORY if is_out_of_memory(error) else EXIT_CRASHED
