"""The errors that users see.

Guarantees: every `CvmError` is one line that names the setting or file, the value and the remedy, and carries the exit
code of the command line. Anything else that escapes is a defect of the program, not of its input.
"""

from __future__ import annotations

import errno
import importlib
from types import ModuleType

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_NOT_RUNNING = 3
EXIT_FAILED = 4
EXIT_GATE_FAILED = 5

# What a process tells the one of ours that started it (a supervised trainer its supervisor); nobody else sees them.
EXIT_CRASHED = 70
EXIT_OUT_OF_MEMORY = 71
EXIT_NO_ROOM = 72


class CvmError(ValueError):
    """An error that the user can mend; its text is one line."""

    exit_code = EXIT_ERROR

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


class ConfigError(CvmError):
    """A setting that is unknown, out of range or at odds with another."""


class CorpusError(CvmError):
    """Input text that is missing, malformed beyond the allowed share, or changed under a run."""


class ModelError(CvmError):
    """A model folder that is missing, incomplete or not a model."""


class CheckpointError(CvmError):
    """A checkpoint that is missing, torn or altered."""


class RunFolderError(CvmError):
    """A run folder that is in use, foreign, or not a run folder."""


class NoRoomError(CvmError):
    """A disk without room for what must be written; with room, the same command goes on."""


class MissingDependencyError(CvmError):
    """An optional library that is not installed; the message names the extra that brings it."""


class Stopped(BaseException):
    """The run was asked to stop and has saved its state, or could not (`is_saved`).

    No `Exception`, as KeyboardInterrupt is none: a handler of a part's errors must not take it for one.

    `signal_number` is the signal that asked (2 or 15); the exit code is 128 + signal_number.
    """

    def __init__(self, signal_number: int, *, is_saved: bool = True) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.signal_number = signal_number
        self.is_saved = is_saved

    @property
    def exit_code(self) -> int:
        return 128 + self.signal_number


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the process or its device has no memory left, whichever library says so."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def is_full_disk(error: Exception) -> bool:
    """Whether there was no room for a write, on the disk or within the user's share of it."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, NoRoomError)


def describe_error(error: Exception) -> str:
    """One line for any error; only a CvmError was written for the user to read."""
    if isinstance(error, CvmError):
        return str(error)
    if is_full_disk(error) and isinstance(error, OSError):
        place = error.filename or "the disk"
        return f"{place}: no room ({error.strerror}): free some space there and run the same command again"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text} (this is a defect of the program; --debug shows where)"


def import_optional(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise the error that names the extra which installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"{module} is not installed ({error}): install it with pip install 'cvm-translator[{extra}]'"
        ) from error
