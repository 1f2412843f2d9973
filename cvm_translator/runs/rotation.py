"""Log files that stay small: `train.log` becomes `train.log.1`, that one `.2`, and the oldest goes.

Guarantees: a file never grows past its bound by more than what is written between two checks, and no line is lost but
with the oldest file. Nothing here raises for a full disk or a folder that has gone: a log must not end a run. The
events (`events.jsonl`) are never rotated: they are the run's diary, which status, reports and a resume read whole.
"""

from __future__ import annotations

import contextlib
import logging.handlers
import os
import shutil
from pathlib import Path


class QuietRotatingHandler(logging.handlers.RotatingFileHandler):
    """A rotating log that loses a line which cannot be written, instead of printing a traceback about it."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def rotate_copy(path: Path, max_bytes: int, num_backups: int) -> bool:
    """Copy a file that others have open for appending to `path.1`, and empty it, once it is over `max_bytes`.

    For what a background process prints: its open file cannot be exchanged. A line that another process writes
    between the copy and the emptying is lost. Returns whether it was done.
    """
    temporary = path.with_name(f".tmp-{path.name}")  # a copy that is cut short must not pass for a whole one
    with contextlib.suppress(OSError):
        if path.stat().st_size <= max_bytes or path.is_symlink() or not path.is_file():
            return False
        shutil.copyfile(path, temporary)
        for number in range(num_backups - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(_numbered(path, number), _numbered(path, number + 1))
        os.replace(temporary, _numbered(path, 1))
        os.truncate(path, 0)
        return True
    with contextlib.suppress(OSError):
        temporary.unlink(missing_ok=True)
    return False


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")
