"""Following a growing text file through everything that may happen to it: rotation, truncation, half-written lines.

Guarantees: a line is told once, and only when it is whole. That holds for a file that is renamed to `name.1` (and on
to `.2`, `.3` …) any number of times between two looks, for one that is copied to `name.1` and emptied, for a writer
that goes on for a while in the renamed file, and for one that grew past the old place after it was emptied. Lost is
only what exists nowhere any more: lines that were deleted, or cut off without a copy, before anybody looked.

The place is kept as an open file and an offset, so an inode cannot come back as another file's. What tells one
generation of the file from the next is its beginning: lines carry times or numbers, so no two begin alike. File events
play no part; whoever has them may look sooner.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

HEAD_BYTES = 512
"""How much of a generation's first line tells it from the others."""
LINGER_SECONDS = 30.0
"""How long the file before the present one is still looked at, for a writer that had it open."""
_MISSING = (FileNotFoundError, NotADirectoryError)


def rotated_paths(path: Path) -> list[Path]:
    """The numbered older generations of a file (`name.1` is the newest of them), oldest first."""
    try:
        names = os.listdir(path.parent)
    except _MISSING:
        return []
    prefix = f"{path.name}."
    numbers = [int(rest) for name in names if name.startswith(prefix) and (rest := name[len(prefix) :]).isdecimal()]
    return [path.with_name(f"{prefix}{number}") for number in sorted(set(numbers), reverse=True)]


def generation_paths(path: Path) -> list[Path]:
    """All files that hold the history of `path`, oldest first, the present one last.

    A numbered file that begins like the one after it is a copy of it, not an older part, and is left out.
    """
    chosen: list[Path] = []
    newer = b""
    for candidate in reversed([*rotated_paths(path), path]):
        try:
            with open(candidate, "rb") as stream:
                head = _read_head(stream)
        except (*_MISSING, PermissionError, IsADirectoryError):
            continue
        if not _is_copy(head, newer):
            chosen.append(candidate)
            newer = head or newer
    return chosen[::-1]


def _read_head(stream: BinaryIO) -> bytes:
    """The first line of a file, or as much of it as tells."""
    return _cut_head(os.pread(stream.fileno(), HEAD_BYTES, 0))


def _cut_head(data: bytes) -> bytes:
    first, end, _ = data[:HEAD_BYTES].partition(b"\n")
    return first + end


def _begin_alike(head: bytes, other: bytes) -> bool:
    """Whether two beginnings, of which one may not be whole yet, are the same file's; of an empty one nobody knows."""
    length = min(len(head), len(other))
    return length > 0 and head[:length] == other[:length]


def _is_copy(head: bytes, newer: bytes) -> bool:
    """Whether a file was copied from the one after it, which has since grown at most."""
    return bool(head) and newer.startswith(head)


class _Generation:
    """One file that is being read, whatever it is called by now."""

    def __init__(self, stream: BinaryIO, offset: int = 0, partial: bytes = b"") -> None:
        self.stream, self.offset, self.partial = stream, offset, partial
        self.head = _read_head(stream)
        self.identity = _identity(os.fstat(stream.fileno()))

    def read_lines(self) -> list[bytes]:
        """What it gained, as whole lines; blank ones and the zero bytes that a hole leaves are dropped.

        If it was emptied while it was read, nothing is taken: the next look finds out.
        """
        self.stream.seek(self.offset)
        data = self.stream.read()
        if not self._begins_as_before():
            return []
        if self.is_young():
            self.head = _cut_head(self.partial + data)
        self.offset += len(data)
        *lines, self.partial = (self.partial + data).split(b"\n")
        return [stripped for line in lines if (stripped := line.strip(b"\0"))]

    def is_young(self) -> bool:
        """Whether too little was read to tell it from others: it may have been exchanged unnoticed."""
        return not self.head.endswith(b"\n") and len(self.head) < HEAD_BYTES

    def is_intact(self) -> bool:
        """Whether the file still begins as it did and holds all that was read of it."""
        return os.fstat(self.stream.fileno()).st_size >= self.offset and self._begins_as_before()

    def _begins_as_before(self) -> bool:
        return not self.head or _begin_alike(self.head, _read_head(self.stream))

    def shrink(self) -> bool:
        """Go back to the end of a file that was cut short but begins as it did; what it kept has been told."""
        size = os.fstat(self.stream.fileno()).st_size
        if size >= self.offset or self.is_young() or _read_head(self.stream) != self.head:
            return False
        kept = os.pread(self.stream.fileno(), 1 << 20, max(0, size - (1 << 20)))
        self.offset, self.partial = size, kept.rpartition(b"\n")[2]
        return True


class _Snapshot:
    """The numbered files as they lay at one moment, newest first, opened, and the present file if there was one.

    How the numbered ones begin is read after the present one was opened: a copy that was being made of it has then
    either been finished, or begins no further than the present one does.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.streams: list[BinaryIO] = []
        for candidate in reversed(rotated_paths(path)):
            with contextlib.suppress(*_MISSING, PermissionError, IsADirectoryError):
                self.streams.append(open(candidate, "rb"))  # noqa: SIM115 (closed by `close` or kept by the tail)
        self.identities = [_identity(os.fstat(stream.fileno())) for stream in self.streams]
        self.present: _Generation | None = None
        with contextlib.suppress(*_MISSING):
            self.present = _Generation(open(path, "rb"))  # noqa: SIM115 (kept open between looks)
        self.heads = [_read_head(stream) for stream in self.streams]

    def is_current(self) -> bool:
        """Whether nothing was renamed while it was taken."""
        now = []
        for candidate in reversed(rotated_paths(self.path)):
            with contextlib.suppress(*_MISSING):
                if os.access(candidate, os.R_OK) and not candidate.is_dir():
                    now.append(_identity(os.stat(candidate)))
        return now == self.identities

    def find_parts(self, places: Iterable[int]) -> list[int]:
        """Of some places those that hold a part of the history, newest first: neither empty nor a copy of the next."""
        parts = []
        newer = self.present.head if self.present else b""
        for place in sorted(places):
            if self.heads[place] and not _is_copy(self.heads[place], newer):
                parts.append(place)
                newer = self.heads[place]
        return parts

    def close(self, *, keep: int | None = None) -> None:
        for place, stream in enumerate(self.streams):
            if place != keep:
                stream.close()


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


class FileTail:
    """Reads the lines that a file gained since the last look; with `with_rotated` the first look tells the numbered
    older generations as well."""

    def __init__(self, path: Path, *, with_rotated: bool = False) -> None:
        self.path = path
        self._with_rotated = with_rotated
        self._current: _Generation | None = None
        self._previous: _Generation | None = None
        self._turned_at = 0.0
        self._known: list[bytes] = []
        """How the numbered files begin that are older than the present one."""

    def poll_lines(self) -> list[bytes]:
        """Whole new lines, without their ends."""
        lines: list[bytes] = []
        if self._previous is not None:
            lines += self._previous.read_lines()
            if self._previous.head not in self._known:
                self._known.append(self._previous.head)
            if time.monotonic() - self._turned_at > LINGER_SECONDS:
                self._previous.stream.close()
                self._previous = None
        try:
            is_same = self._current is not None and _identity(os.stat(self.path)) == self._current.identity
        except _MISSING:  # between two names, or gone; a writer that has it open may go on in it
            return lines + self._read_on()
        current = self._current
        if is_same and current and not current.is_young() and (current.is_intact() or current.shrink()):
            return lines + current.read_lines()
        return lines + self._turn(is_same)

    def _read_on(self) -> list[bytes]:
        """What the generation at hand gained. One without a whole line waits: it may be exchanged before it is read,
        and others may have come before it."""
        return [] if self._current is None or self._current.is_young() else self._current.read_lines()

    def _turn(self, is_same: bool) -> list[bytes]:
        """Finish the generation that was read, read those between, and go over to the present one.

        While files are being renamed nothing is decided: the generation at hand stays open, and the next look does it.
        """
        snapshot, old = _Snapshot(self.path), self._current
        if snapshot.present is None or not snapshot.is_current():
            snapshot.close()
            if snapshot.present is not None:
                snapshot.present.stream.close()
            return [] if is_same else self._read_on()
        lines, places = self._finish(old, snapshot, is_same)
        parts = snapshot.find_parts(places)
        generations = [_Generation(snapshot.streams[place]) for place in reversed(parts)]
        lines += [line for generation in generations for line in generation.read_lines()]
        self._known = [snapshot.heads[place] for place in snapshot.find_parts(range(len(snapshot.heads)))]
        snapshot.close(keep=parts[0] if parts else None)
        is_renamed = old is not None and not is_same and old.is_intact()
        self._keep_previous(generations[-1] if generations else old if is_renamed else None, old)
        self._current = snapshot.present
        return lines + self._read_on()

    def _finish(self, old: _Generation | None, snapshot: _Snapshot, is_same: bool) -> tuple[list[bytes], Iterable[int]]:
        """What is left of the generation at hand, and where those lie that may have come after it."""
        everything = range(len(snapshot.heads))
        if old is None:
            return [], everything if self._with_rotated else ()
        is_emptied = is_same or not old.is_intact()
        place = _find(old, snapshot, is_emptied)
        lines: list[bytes] = []
        if is_emptied and place is not None:  # it was copied before it was emptied: the rest is in the copy
            lines = _Generation(snapshot.streams[place], old.offset, old.partial).read_lines()
        elif not is_emptied and not (old.is_young() and old.identity in snapshot.identities):
            lines = old.read_lines()
        known = {*self._known, old.head} if lines else {*self._known}
        return lines, range(place) if place is not None else [n for n in everything if snapshot.heads[n] not in known]

    def _keep_previous(self, last: _Generation | None, old: _Generation | None) -> None:
        """The generation just before the present one is looked at a little longer."""
        if old is not None and old is not last:
            old.stream.close()
        if last is not None:
            if self._previous is not None:
                self._previous.stream.close()
            self._previous, self._turned_at = last, time.monotonic()

    def close(self) -> None:
        for generation in (self._previous, self._current):
            if generation is not None:
                generation.stream.close()
        self._previous = self._current = None


def _find(old: _Generation, snapshot: _Snapshot, is_emptied: bool) -> int | None:
    """Where a generation lies now among the numbered files; one that was emptied, its copy.

    Of one that hardly anything was read of the place says nothing: others may have come and gone before it.
    """
    if old.is_young():
        return None
    if not is_emptied and old.identity in snapshot.identities:
        return snapshot.identities.index(old.identity)
    return next((place for place, head in enumerate(snapshot.heads) if head == old.head), None)
