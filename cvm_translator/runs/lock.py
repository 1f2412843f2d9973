"""One holder per run folder, and one at a time of whatever else two runs may share.

Guarantees: of any number of processes that ask at once exactly one gets the lock, and the lock dies with its holder,
however that ends, since it is an advisory lock of the operating system (flock) on `run.lock`. The file's text names
the holder for messages; it is never the lock itself, so a stale one blocks nobody.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cvm_translator.errors import RunFolderError


def process_start_time(pid: int) -> float | None:
    """Start of a process in clock ticks since boot (Linux), or None where it is unknown or the process is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return float(text.rsplit(")", 1)[1].split()[19])


class RunLock:
    """The lock of one run folder; hold the object as long as the lock."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, **fields: Any) -> None:
        """Take the lock or raise the error that names its holder."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        if not _try_exclusive(descriptor):
            os.close(descriptor)
            holder = _read_text(self.path) or {}
            raise RunFolderError(
                f"{self.path.parent} is in use by process {holder.get('pid', 'unknown')}"
                f" on {holder.get('host', 'this host')} since"
                f" {holder.get('started_at', 'just now')}: stop it with cvm-translator stop {self.path.parent},"
                " or choose another --output-dir"
            )
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "process_start_time": process_start_time(os.getpid()),
            "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        text = (json.dumps(holder | fields, default=str) + "\n").encode()
        try:
            # Overwritten before it is cut: on a full disk the text of a killed holder has left room for this one.
            os.pwrite(descriptor, text, 0)
            os.ftruncate(descriptor, len(text))
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def release(self) -> None:
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        if self._descriptor is None:
            self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextlib.contextmanager
def waited_lock(path: Path, on_wait: Callable[[], object]) -> Iterator[None]:
    """Hold a lock that others wait for, on a file that is there only meanwhile.

    `on_wait` is called several times a second while another process holds it, and may raise.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            while not _try_exclusive(descriptor):
                on_wait()
            if not _is_file(descriptor, path):
                continue  # whoever held it has removed the file
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that the path names now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _try_exclusive(descriptor: int) -> bool:
    """Ask for the lock, again for a moment, since a reader may hold it for an instant to see whether it is free."""
    for _ in range(10):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            time.sleep(0.02)
        else:
            return True
    return False


def _read_text(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError):
        data = json.loads(path.read_text())
        return data if isinstance(data, dict) else None
    return None


def read_holder(path: Path) -> dict[str, Any] | None:
    """Who holds the lock now, or None when nobody does.

    A shared lock is tried for an instant; `acquire` asks again for a moment, so this never turns a holder away.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return _read_text(path) or {"pid": None}
    else:
        return None
    finally:
        os.close(descriptor)
