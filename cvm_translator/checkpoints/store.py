"""The checkpoints of one training: named by step and attempt, kept by rule, recovered after a crash.

    checkpoint_1000/  checkpoint_2000/  checkpoint_2000.attempt_2/  latest -> …  best_model -> …

Guarantees: a checkpoint is written beside its place, fsynced, renamed, its parent fsynced, read back and verified; only
then do `latest` and `best_model` move, each in one rename, and only then are old ones removed. A crash between any two
of these steps loses no committed checkpoint. Retention never removes the best, the newest two that verify, or a
protected rollback target. Newest means by (attempt, step): what a rolled-back attempt left behind never shadows its
successor.

Refuses: to load anything whose hashes differ, by name. One process at a time may write: the holder of the run's lock.
Others read with `load_checkpoint`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cvm_translator.checkpoints.folder import (
    LoadedCheckpoint,
    Manifest,
    load_checkpoint,
    load_verified,
    read_plain,
    verify_checkpoint,
    write_amended,
    write_checkpoint,
    write_error,
)
from cvm_translator.errors import CheckpointError
from cvm_translator.runs.atomic import TEMPORARY_PREFIX, fsync_directory

LATEST = "latest"
BEST = "best_model"
_REPLACED_PREFIX = ".replaced-"
_NAME = re.compile(r"checkpoint_(0|[1-9]\d*)(?:\.attempt_([2-9]|[1-9]\d+))?\Z")


def checkpoint_name(step: int, attempt: int) -> str:
    """`checkpoint_<step>` for the first attempt, `checkpoint_<step>.attempt_<N>` for later ones."""
    return f"checkpoint_{step}" + (f".attempt_{attempt}" if attempt > 1 else "")


def _order(name: str) -> tuple[int, int]:
    """(attempt, step) of a checkpoint's name."""
    match = _NAME.match(name)
    assert match is not None, name
    return int(match[2] or 1), int(match[1])


@dataclass(frozen=True)
class SavedCheckpoint:
    """A committed checkpoint."""

    path: Path
    num_bytes: int
    seconds: float


class CheckpointStore:
    """Saves, finds and removes the checkpoints in `directory`.

    `keep` newest ones are kept beside the best and the protected; `report` is told, a line each, of what was found
    damaged, removed or restored. The first `save` or `load_newest_valid` clears what a crash left behind.
    """

    def __init__(self, directory: Path, keep: int = 3, *, report: Callable[[str], object]) -> None:
        assert keep >= 2, keep
        self.directory = directory
        self.keep = keep
        self._report = report
        self._protected: set[str] = set()
        self._manifests: dict[str, Manifest | None] = {}
        """Of checkpoints whose bytes this process has compared; None for damaged ones."""
        self._is_recovered = False

    def protect(self, name: str) -> None:
        """Keep a rollback target from retention until `unprotect`."""
        self._protected.add(name)

    def unprotect(self, name: str) -> None:
        self._protected.discard(name)

    def names(self) -> list[str]:
        """Names of all checkpoint folders, valid or not, newest first by (attempt, step)."""
        if not self.directory.is_dir():
            return []
        names = [entry.name for entry in self.directory.iterdir() if _NAME.match(entry.name) and entry.is_dir()]
        return sorted(names, key=_order, reverse=True)

    def link_target(self, link: str) -> str | None:
        """The name that `latest` or `best_model` points to, if there is such a link."""
        path = self.directory / link
        return os.readlink(path) if path.is_symlink() else None

    # ---------------------------------------------------------------------------------------------------- saving

    def save(
        self,
        step: int,
        attempt: int,
        *,
        tensors: Mapping[str, Mapping[str, Tensor]],
        torch_states: Mapping[str, Any],
        plain: Mapping[str, Any],
        is_best: bool,
    ) -> SavedCheckpoint:
        """Commit one complete checkpoint; a replay may save the same step again.

        Raises DiskFullError or CheckpointError, after which every older checkpoint is as it was.
        """
        start = time.monotonic()
        self._recover()
        name = checkpoint_name(step, attempt)
        with self._temporary_folder(name, step) as temporary:
            manifest = write_checkpoint(
                temporary, step, attempt, tensors=tensors, torch_states=torch_states, plain=plain, is_best=is_best
            )
            if self._verified_manifest(name) == manifest:
                shutil.rmtree(temporary)
            else:
                self._commit(temporary, name, manifest)
            self._point(LATEST, name)
            if is_best:
                self._point(BEST, name)
        self._remove_old()
        return SavedCheckpoint(self.directory / name, manifest.num_bytes, time.monotonic() - start)

    def amend(self, name: str, change: Callable[[dict[str, Any]], dict[str, Any]]) -> SavedCheckpoint:
        """Put `change(plain)` in the place of a checkpoint's plain data, and make it the best.

        Raises CheckpointError where the checkpoint is missing or damaged, else as `save`; the old one then stays.
        """
        start = time.monotonic()
        path = self.directory / name
        old = self._verified_manifest(name)
        if old is None:
            raise CheckpointError(f"checkpoint {path} is missing or damaged: it cannot become the best")
        with self._temporary_folder(name, old.step) as temporary:
            plain = change(read_plain(path))
            manifest = write_amended(temporary, path, old, plain, is_best=True)
            self._commit(temporary, name, manifest)  # which compares all bytes
            self._point(BEST, name)
        return SavedCheckpoint(path, manifest.num_bytes, time.monotonic() - start)

    @contextlib.contextmanager
    def _temporary_folder(self, name: str, step: int) -> Iterator[Path]:
        """The place where a checkpoint is written before it is committed; gone after an error, which names the step."""
        temporary = self.directory / f"{TEMPORARY_PREFIX}{name}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            yield temporary
        except Exception as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, OSError):
                raise write_error(self.directory, step, error) from error
            raise

    def _commit(self, temporary: Path, name: str, manifest: Manifest) -> None:
        """Rename into place and read back. An older folder of that name stands aside until the new one has verified."""
        place = self.directory / name
        aside = self.directory / f"{_REPLACED_PREFIX}{name}"
        self._manifests.pop(name, None)
        if place.exists():
            os.rename(place, aside)
        try:
            os.rename(temporary, place)
            fsync_directory(self.directory)
            if verify_checkpoint(place) != manifest:
                raise CheckpointError(f"checkpoint {place} does not read back as it was written")
        except (OSError, CheckpointError):
            shutil.rmtree(place, ignore_errors=True)
            if aside.exists():
                os.rename(aside, place)
            raise
        self._manifests[name] = manifest
        if aside.exists():
            self._remove(aside)

    def _point(self, link: str, name: str) -> None:
        """Move a link in one rename, unless it points there already."""
        if self.link_target(link) == name:
            return
        temporary = self.directory / f"{TEMPORARY_PREFIX}{link}"
        temporary.unlink(missing_ok=True)
        os.symlink(name, temporary)
        os.replace(temporary, self.directory / link)
        fsync_directory(self.directory)

    # ------------------------------------------------------------------------------------------------- retention

    def _remove_old(self) -> None:
        """Remove what no rule keeps. Damaged folders neither count as kept nor are removed: they are evidence."""
        valid = [name for name in self.names() if self._verified_manifest(name) is not None]
        kept = {*valid[: self.keep], self.link_target(BEST), *self._protected}
        for name in valid:
            if name not in kept:
                self._remove(self.directory / name)

    def _remove(self, path: Path) -> None:
        """Rename first, and durably, so that a half-removed folder never bears a checkpoint's name."""
        self._manifests.pop(path.name, None)
        doomed = self.directory / f"{TEMPORARY_PREFIX}removed-{path.name}"
        try:
            os.rename(path, doomed)
            fsync_directory(self.directory)
            shutil.rmtree(doomed)
        except OSError as error:
            self._report(f"old checkpoint {path} could not be removed: {error}")

    def _verified_manifest(self, name: str) -> Manifest | None:
        """The manifest of a checkpoint if its bytes match it (compared once), None if it is missing or damaged."""
        if name not in self._manifests:
            path = self.directory / name
            if not path.exists():
                return None
            try:
                self._manifests[name] = verify_checkpoint(path)
            except CheckpointError as error:
                self._manifests[name] = None
                self._report(str(error))
        return self._manifests[name]

    # --------------------------------------------------------------------------------------------------- loading

    def load(self, checkpoint: str | Path) -> LoadedCheckpoint:
        """Load a checkpoint by its name in this store, by `latest` or `best_model`, or by path.

        Raises CheckpointError if it is missing or any of its bytes differ from its manifest.
        """
        path = self.directory / checkpoint
        if not path.is_dir():
            raise CheckpointError(f"there is no checkpoint {path}; present: {', '.join(self.names()) or 'none'}")
        return load_checkpoint(path)

    def load_newest_valid(self) -> LoadedCheckpoint | None:
        """The newest checkpoint by (attempt, step) that verifies, after reporting each newer one that does not.

        None when there are no checkpoints at all; CheckpointError when none of those present is valid. `latest`, and
        `best_model` if it cannot be loaded, are moved to what is.
        """
        self._recover()
        names = self.names()
        for name in names:
            manifest = self._verified_manifest(name)
            if manifest is not None:
                loaded = load_verified(self.directory / name, manifest)
                self._repair_links(name)
                return loaded
        if names:
            raise CheckpointError(
                f"none of the {len(names)} checkpoints in {self.directory} is valid ({', '.join(names)}):"
                " restore one from a backup, or move them away to begin again"
            )
        return None

    def _repair_links(self, newest: str) -> None:
        """Finish what a crash between the commit and the links left undone, or what damage has made unusable."""
        self._point(LATEST, newest)
        for name in self.names():
            manifest = self._verified_manifest(name)
            if manifest is not None and manifest.is_best:
                if self.link_target(BEST) != name:
                    self._point(BEST, name)
                    self._report(f"{BEST} now points to {name}, the newest best checkpoint that is valid")
                return

    def _recover(self) -> None:
        """Remove what a crash left half-written and put back what it had set aside; once per store."""
        if self._is_recovered:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        entries = sorted(self.directory.iterdir())
        for entry in entries:
            if entry.name.startswith(TEMPORARY_PREFIX):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink()
        for entry in entries:
            if entry.name.startswith(_REPLACED_PREFIX):
                self._resolve_replacement(entry)
        fsync_directory(self.directory)
        fsync_directory(self.directory.parent)
        self._is_recovered = True

    def _resolve_replacement(self, aside: Path) -> None:
        """A folder was being replaced: the new one if it was committed, else the old one."""
        name = aside.name.removeprefix(_REPLACED_PREFIX)
        if self._verified_manifest(name) is not None:
            self._remove(aside)
            return
        if (self.directory / name).exists():
            self._remove(self.directory / name)
        os.rename(aside, self.directory / name)
        self._manifests.pop(name, None)
        self._report(f"{name} was being replaced when the process ended: the old one is back")
