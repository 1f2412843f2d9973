"""A disk that may lose what was not synced: file operations recorded as they happen, and the states a crash can leave.

`record` lets an action run on a real folder and notes each of its operations. What a power cut may leave of the first n
of them is then built without the machine: names and contents that were synced are there; of the others any may be
missing, in any order, and contents may be cut short, zeros, or garbled. Guarantees: after recording, the model's own
state is compared with the real folder, so an operation that escaped is an error and not a gap in the proof.

The model is harsher than file systems are: each change of a name may be lost by itself unless its folder was synced
afterwards, syncing a file says nothing of its name, and changes of names in one folder may be reordered.
"""

from __future__ import annotations

import builtins
import contextlib
import itertools
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import BenchmarkError

ROOT = 0
Folder = dict[str, int]
"""Name to node."""


@dataclass(frozen=True)
class Write:
    """Bytes appended to a file."""

    node: int
    data: bytes


@dataclass(frozen=True)
class Sync:
    """fsync of a file or a folder."""

    node: int


@dataclass(frozen=True)
class Change:
    """Names that change at once in one folder: a rename takes one away and gives another. None is a name that goes."""

    folder: int
    names: tuple[tuple[str, int | None], ...]


Operation = Write | Sync | Change


@dataclass
class Disk:
    """Folders, files and links by node; 0 is the root."""

    folders: dict[int, Folder] = field(default_factory=lambda: {ROOT: {}})
    files: dict[int, bytes] = field(default_factory=dict)
    links: dict[int, str] = field(default_factory=dict)

    def copy(self) -> Disk:
        return Disk({node: dict(names) for node, names in self.folders.items()}, dict(self.files), dict(self.links))

    def find(self, parts: Sequence[str]) -> int | None:
        """The node at a path, links not followed."""
        node: int | None = ROOT
        for part in parts:
            if node is None:
                return None
            node = self.folders.get(node, {}).get(part)
        return node

    def apply(self, operation: Operation) -> None:
        if isinstance(operation, Write):
            self.files[operation.node] = self.files[operation.node] + operation.data
        elif isinstance(operation, Change):
            folder = self.folders[operation.folder]
            for name, node in operation.names:
                if node is None:
                    folder.pop(name, None)
                else:
                    folder[name] = node

    def tree(self, node: int = ROOT) -> dict[str, Any]:
        """What is reachable: bytes for files, `-> target` for links."""
        return {name: self.show(child) for name, child in self.folders[node].items()}

    def show(self, node: int) -> Any:
        if node in self.folders:
            return self.tree(node)
        return self.files[node] if node in self.files else f"-> {self.links[node]}"


def read_tree(path: Path) -> dict[str, Any]:
    """A real folder in the form of `Disk.tree`."""
    return {
        entry.name: f"-> {os.readlink(entry)}"
        if entry.is_symlink()
        else read_tree(entry)
        if entry.is_dir()
        else entry.read_bytes()
        for entry in path.iterdir()
    }


def write_tree(path: Path, tree: Mapping[str, Any]) -> None:
    """Make a folder hold exactly this."""
    path.mkdir()
    for name, value in tree.items():
        if isinstance(value, bytes):
            (path / name).write_bytes(value)
        elif isinstance(value, str):
            os.symlink(value.removeprefix("-> "), path / name)
        else:
            write_tree(path / name, value)


def load_disk(path: Path) -> Disk:
    """A real folder as a disk on which everything is synced."""
    disk = Disk()

    def add(tree: Mapping[str, Any], folder: int) -> None:
        for name, value in tree.items():
            node = len(disk.folders) + len(disk.files) + len(disk.links)
            disk.folders[folder][name] = node
            if isinstance(value, bytes):
                disk.files[node] = value
            elif isinstance(value, str):
                disk.links[node] = value.removeprefix("-> ")
            else:
                disk.folders[node] = {}
                add(value, node)

    add(read_tree(path), ROOT)
    return disk


# --------------------------------------------------------------------------------------------------------- recording


@dataclass
class Recording:
    """What an action did to a folder. `before` is wholly synced; new nodes are empty in it."""

    before: Disk
    after: Disk
    operations: list[Operation]


class _Stream:
    """A file open for writing whose writes are noted."""

    def __init__(self, stream: Any, note: Callable[[bytes], None]) -> None:
        self._stream = stream
        self._note = note

    def write(self, data: Any) -> Any:
        self._note(bytes(memoryview(data).cast("B")))
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


class _Recorder:
    """Stands in for the functions of `os` and for `open` while an action runs."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.before = load_disk(root)
        self.now = self.before.copy()
        self.operations: list[Operation] = []
        self._next_node = 1 + max([*self.now.folders, *self.now.files, *self.now.links])

    def parts(self, path: Any, dir_fd: int | None = None) -> tuple[str, ...] | None:
        """The path below the root, or None for one outside."""
        absolute = Path(os.path.abspath(path))
        if dir_fd is not None:
            absolute = Path(os.readlink(f"/proc/self/fd/{dir_fd}")) / os.fspath(path)
        elif absolute.parent.exists():
            absolute = absolute.parent.resolve() / absolute.name
        return absolute.relative_to(self.root).parts if absolute.is_relative_to(self.root) else None

    def note(self, operation: Operation) -> None:
        self.operations.append(operation)
        self.now.apply(operation)

    def new_node(self, kind: dict[int, Any], kind_before: dict[int, Any], empty: Any) -> int:
        """A node that is there, and empty, before anyone can name it: only its name and content can be lost."""
        node = self._next_node
        self._next_node += 1
        kind[node], kind_before[node] = empty, type(empty)(empty)
        return node

    def change(self, *changes: tuple[tuple[str, ...], int | None]) -> None:
        folders = {self.now.find(parts[:-1]) for parts, _ in changes}
        if len(folders) != 1 or None in folders:
            raise BenchmarkError(f"a change of names beyond one folder is not modelled: {changes}")
        self.note(Change(folders.pop() or ROOT, tuple((parts[-1], node) for parts, node in changes)))

    # ------------------------------------------------------------------------------------------ stand-ins

    def replacements(self) -> dict[str, Callable[..., Any]]:
        real = {name: getattr(os, name) for name in ("fsync", "mkdir", "rmdir", "unlink", "symlink", "rename")}

        def fsync(descriptor: int) -> None:
            real["fsync"](descriptor)
            parts = self.parts(os.readlink(f"/proc/self/fd/{descriptor}"))
            node = None if parts is None else self.now.find(parts)
            if node is not None:
                self.note(Sync(node))

        def mkdir(path: Any, mode: int = 0o777, *, dir_fd: int | None = None) -> None:
            parts = self.parts(path, dir_fd)
            real["mkdir"](path, mode, dir_fd=dir_fd)
            if parts:
                self.change((parts, self.new_node(self.now.folders, self.before.folders, {})))

        def remove(name: str) -> Callable[..., None]:
            def remove(path: Any, *, dir_fd: int | None = None) -> None:
                parts = self.parts(path, dir_fd)
                real[name](path, dir_fd=dir_fd)
                if parts:
                    self.change((parts, None))

            return remove

        def symlink(target: Any, path: Any, *arguments: Any, **options: Any) -> None:
            parts = self.parts(path)
            real["symlink"](target, path, *arguments, **options)
            if parts:
                self.change((parts, self.new_node(self.now.links, self.before.links, str(target))))

        def rename(source: Any, target: Any) -> None:
            old, new = self.parts(source), self.parts(target)
            os_rename(source, target)
            if old and new:
                self.change((old, None), (new, self.now.find(old)))

        os_rename = os.replace  # on POSIX the two are one
        return {
            "fsync": fsync,
            "mkdir": mkdir,
            "rmdir": remove("rmdir"),
            "unlink": remove("unlink"),
            "remove": remove("unlink"),
            "symlink": symlink,
            "rename": rename,
            "replace": rename,
        }

    def open(self, real_open: Callable[..., Any]) -> Callable[..., Any]:
        def recording_open(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            parts = None if isinstance(file, int) or not set(mode) & set("wxa+") else self.parts(file)
            if parts and self.now.find(parts) is not None:
                raise BenchmarkError(f"{file} is written into in place: not modelled, and no checkpoint does it")
            stream = real_open(file, mode, *arguments, **options)
            if not parts:
                return stream
            node = self.new_node(self.now.files, self.before.files, b"")
            self.change((parts, node))
            return _Stream(stream, lambda data: self.note(Write(node, data)))

        return recording_open


def record(root: Path, action: Callable[[], object]) -> Recording:
    """Run `action` and note what it does to the folder `root`, which must exist."""
    recorder = _Recorder(root)
    with contextlib.ExitStack() as stack:
        for name, replacement in recorder.replacements().items():
            stack.callback(setattr, os, name, getattr(os, name))
            setattr(os, name, replacement)
        stack.callback(setattr, builtins, "open", builtins.open)
        builtins.open = recorder.open(builtins.open)
        action()
    if recorder.now.tree() != read_tree(root):
        raise BenchmarkError(f"operations on {root} escaped the recording: the model's state is not the folder's")
    return Recording(recorder.before, recorder.now, recorder.operations)


# ------------------------------------------------------------------------------------------------------ after a crash


@dataclass(frozen=True)
class Unsynced:
    """A disk after the first operations: what is synced, and what may be lost."""

    synced: Disk
    changes: tuple[Change, ...]
    """Changes of names that no sync of their folder followed."""
    contents: dict[int, bytes]
    """Whole contents of files that are not synced to their end."""


def list_unsynced(recording: Recording) -> Iterator[Unsynced]:
    """The disk before the first operation and after each.

    Writes in a row to one file count as one: what a crash between them leaves is among the garbled contents of the row.
    """
    synced, now = recording.before.copy(), recording.before.copy()
    changes: list[Change] = []
    yield Unsynced(synced.copy(), (), {})
    for operation, following in itertools.zip_longest(recording.operations, recording.operations[1:]):
        now.apply(operation)
        if isinstance(operation, Change):
            changes.append(operation)
        elif isinstance(operation, Sync) and operation.node in synced.files:
            synced.files[operation.node] = now.files[operation.node]
        elif isinstance(operation, Sync):
            for change in changes:
                if change.folder == operation.node:
                    synced.apply(change)
            changes = [change for change in changes if change.folder != operation.node]
        if isinstance(operation, Write) and isinstance(following, Write) and following.node == operation.node:
            continue
        contents = {node: data for node, data in now.files.items() if data != synced.files[node]}
        yield Unsynced(synced.copy(), tuple(changes), contents)


def garble(generator: random.Random, synced: bytes, whole: bytes) -> bytes:
    """What may be found of a file that is synced only up to `synced`."""
    tail = whole[len(synced) :]
    kind = generator.randrange(6)
    if kind == 0:
        return synced
    if kind == 1:
        return whole
    if kind == 2:
        return synced + tail[: generator.randrange(len(tail))]
    if kind == 3:
        return synced + bytes(len(tail))
    if kind == 4:
        cut = generator.randrange(len(tail))
        return synced + tail[:cut] + bytes(len(tail) - cut)
    changed = bytearray(tail)
    for _ in range(generator.randint(1, 8)):
        changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    return synced + bytes(changed)


def list_states(unsynced: Unsynced, generator: random.Random, num_random: int) -> Iterator[Disk]:
    """Disks a crash may leave: all lost, all kept, each change lost or kept alone, and random ones in random order."""
    changes = unsynced.changes
    choices: list[list[Change]] = [[], list(changes)]
    if len(changes) > 1:
        choices += [[change] for change in changes]
        choices += [[other for other in changes if other is not change] for change in changes]
    for _ in range(num_random if changes or unsynced.contents else 0):
        kept = [change for change in changes if generator.random() < 0.7]
        if generator.random() < 0.5:
            generator.shuffle(kept)
        choices.append(kept)
    for number, kept in enumerate(choices):
        disk = unsynced.synced.copy()
        for change in kept:
            disk.apply(change)
        for node, whole in unsynced.contents.items():
            # The first two are the plainest: nothing that was not synced is there, or all of it is.
            plain = disk.files[node] if number == 0 else whole
            disk.files[node] = plain if number < 2 else garble(generator, unsynced.synced.files[node], whole)
        yield disk
