"""A disk that is full at any point of a save: nothing older is lost, and the save succeeds once there is room.

A small real training gives the states that are saved. The store lies on a small tmpfs, mounted for this program only.
Before each save a ballast file leaves room for a part of the checkpoint, from none to all but the last page, at
`--num-offsets` different places. Checked are, each time:

- the save fails with the error that says there is no room, and names the folder and the step;
- every older checkpoint is there, byte for byte, with its links, and nothing half-written beside it;
- a new process finds the last committed checkpoint;
- now and then: with the ballast gone the same save succeeds and is found.

With `--run`, a real run on a small tmpfs is filled up while it trains instead: it must stay, say so in a `warning`
event whose code contains `disk_full`, and go on by itself once room is made.

    python -m benchmarks.reliability.disk_full [--run]

It begins anew each time. Mounting needs root or user namespaces. The program ends with 1 if a check fails.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import common, evidence
from benchmarks.common import Arm, BenchmarkError
from benchmarks.reliability.disk_model import read_tree
from benchmarks.reliability.unsynced_writes import Save, collect_saves
from cvm_translator.checkpoints.folder import DiskFullError
from cvm_translator.checkpoints.store import CheckpointStore
from cvm_translator.errors import CheckpointError
from cvm_translator.runs.events import EventTail
from cvm_translator.runs.lock import read_holder

NAME = "disk_full"
DIM = 32
"""Of the model: its checkpoints fill more pages than there are offsets."""
KEEP = 2
MOUNT_MIB = 16
RETRY_EVERY = 10
INSIDE = "CVM_TRANSLATOR_DISK_FULL_INSIDE"
"""Set where the program runs in a mount namespace of its own."""

FAILED = "the save fails and says that there is no room"
KEPT = "every older checkpoint and link is there, byte for byte, and nothing half-written"
FOUND = "a new process finds the last committed checkpoint"
RETRIED = "with room again the same save succeeds and is found"
CHECKS = (FAILED, KEPT, FOUND, RETRIED)

RUN_MIB = 600
ROOM_LEFT_BYTES = 256 << 10
"""Left on the run's disk: enough for events and logs, too little for a checkpoint."""
RUN_TIMEOUT_SECONDS = 1800.0
PAUSE_SECONDS = 10.0
RUN_SETTINGS = (
    "teacher.training.num_iterations=400",
    "teacher.training.checkpoint_every_steps=20",
    "teacher.training.validate_every_steps=200",
    "distillation.num_iterations=100",
    "validation.every_steps=100",
    "corpus.validation_size=50",
    "corpus.test_size=50",
)


# ---------------------------------------------------------------------------------------------------------- the disk


class Disk:
    """A small tmpfs and the ballast that fills it."""

    def __init__(self, place: Path, num_mib: int) -> None:
        self.place = place
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_mib}m", "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchmarkError(f"no tmpfs can be mounted at {place} ({done.stderr.strip()}): run this as root")
        self.ballast = place / "ballast"

    @property
    def page_bytes(self) -> int:
        return os.statvfs(self.place).f_frsize

    @property
    def free_bytes(self) -> int:
        status = os.statvfs(self.place)
        return status.f_bavail * status.f_frsize

    def fill(self, room_bytes: int) -> None:
        """Leave so much room, to the page."""
        self.make_room()
        size = self.free_bytes - room_bytes
        if size > 0:
            with open(self.ballast, "wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, size)

    def make_room(self) -> None:
        self.ballast.unlink(missing_ok=True)


def enter_namespace(arguments: list[str]) -> int:
    """Run this program once more where its mounts are seen by nobody else and end with it."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        raise BenchmarkError("this system lets no process have mounts of its own (unshare --mount failed): run as root")
    command = [*unshare, sys.executable, "-m", "benchmarks.reliability.disk_full", *arguments]
    return subprocess.run(command, env=os.environ | {INSIDE: "1"}, check=False).returncode


# ---------------------------------------------------------------------------------------------------------- the store


def open_store(directory: Path) -> CheckpointStore:
    return CheckpointStore(directory, KEEP, report=lambda line: None)


class Trials:
    """Saves that fail for want of room, one after the other, on one store."""

    def __init__(self, disk: Disk, saves: list[Save]) -> None:
        self.disk = disk
        self.directory = disk.place / "checkpoints"
        self.saves = saves
        self.number = 0
        self.failures: dict[str, list[str]] = {check: [] for check in CHECKS}
        for _ in range(KEEP + 1):
            self.last = self.next_save().run(open_store(self.directory))
            self.number += 1
        before = disk.free_bytes
        scratch = disk.place / "scratch"
        self.next_save().run(open_store(scratch))
        self.needed_bytes = before - disk.free_bytes
        shutil.rmtree(scratch)

    def next_save(self) -> Save:
        """What is saved next: the training's states over and over, later rounds as later attempts."""
        attempt, index = divmod(self.number, len(self.saves))
        save = self.saves[index]
        return Save(save.step, attempt + 1, save.state, save.is_best)

    def fail_at(self, room_bytes: int) -> None:
        save, what = self.next_save(), f"with room for {room_bytes:,} bytes"
        before = read_tree(self.directory)
        self.disk.fill(room_bytes)
        try:
            name = save.run(open_store(self.directory))
        except DiskFullError as error:
            if str(self.directory) not in str(error) or f"step {save.step} " not in str(error):
                self.failures[FAILED].append(f"{what}: {error}")
        except CheckpointError as error:
            self.failures[FAILED].append(f"{what}: {error}")
        else:
            self.failures[FAILED].append(f"{what}: {name} was saved")
        if read_tree(self.directory) != before:
            self.failures[KEPT].append(what)
        self._check_found(FOUND, self.last, what)

    def retry(self) -> None:
        """Make room and save."""
        self.disk.make_room()
        self.last = self.next_save().run(open_store(self.directory))
        self.number += 1
        self._check_found(RETRIED, self.last, f"after {self.last}")

    def _check_found(self, check: str, name: str, what: str) -> None:
        try:
            loaded = open_store(self.directory).load_newest_valid()
        except CheckpointError as error:
            self.failures[check].append(f"{what}: {error}")
            return
        if loaded is None or loaded.path.name != name:
            self.failures[check].append(f"{what}: {loaded.path.name if loaded else None}, not {name}")


def run_store(options: Namespace, work: Path) -> dict[str, Any]:
    saves = collect_saves(work / "training", dim=DIM)
    disk = Disk(work / "disk", MOUNT_MIB)
    trials = Trials(disk, list(saves.values()))
    num_pages = trials.needed_bytes // disk.page_bytes
    if num_pages < options.num_offsets:
        raise BenchmarkError(f"a save takes {num_pages} pages: --num-offsets {options.num_offsets} is too many")
    offsets = [number * num_pages // options.num_offsets * disk.page_bytes for number in range(options.num_offsets)]
    num_retries = 0
    for number, offset in enumerate(offsets, start=1):
        trials.fail_at(offset)
        if number % RETRY_EVERY == 0 or number == len(offsets):
            trials.retry()
            num_retries += 1
    return {
        "needed_bytes": trials.needed_bytes,
        "page_bytes": disk.page_bytes,
        "num_offsets": len(set(offsets)),
        "num_retries": num_retries,
        "failures": trials.failures,
    }


# ------------------------------------------------------------------------------------------------------------ the run


def follow(tail: EventTail, arm: Arm, is_reached: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait for an event of a run that must go on meanwhile."""
    deadline = time.monotonic() + RUN_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        is_running = read_holder(arm.layout.lock) is not None
        for event in tail.poll():
            if is_reached(event):
                return event
        if not is_running:
            raise BenchmarkError(f"the run ended: see {arm.layout.logs}")
        time.sleep(0.05)
    raise BenchmarkError(f"nothing came in {RUN_TIMEOUT_SECONDS:.0f} s: see {arm.layout.logs}")


def run_run(options: Namespace, work: Path) -> dict[str, Any]:
    """Fill a run's disk while it trains, see it wait, make room, see it go on."""
    disk = Disk(work / "disk", RUN_MIB)
    settings = (f"teacher.cache_dir={work / 'teachers'}", "num_threads=1", *RUN_SETTINGS, *options.set)
    arm = Arm(NAME, options.config.resolve(), settings, disk.place / "run")
    done = subprocess.run(arm.command("start"), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchmarkError(f"the run did not start: {done.stderr.strip()}")
    tail = EventTail(arm.layout.events)
    failures: dict[str, list[str]] = {"the run waits, says why, and goes on once there is room": []}
    try:
        follow(tail, arm, lambda event: event["kind"] == "checkpoint" and event["step"] > 0)
        disk.fill(ROOM_LEFT_BYTES)
        warning = follow(tail, arm, lambda e: e["kind"] == "warning" and "disk_full" in str(e.get("code")))
        time.sleep(PAUSE_SECONDS)
        if read_holder(arm.layout.lock) is None:
            failures[next(iter(failures))].append("it ended instead of waiting")
        disk.make_room()
        after = follow(tail, arm, lambda event: event["kind"] == "checkpoint")
        follow(tail, arm, lambda event: event["kind"] == "checkpoint" and event["step"] > after["step"])
    finally:
        disk.make_room()
        subprocess.run([*common.PROGRAM, "stop", str(arm.folder)], check=False, stdout=sys.stderr)
    return {"message": warning.get("message"), "saved_after_step": after["step"], "failures": failures}


# ------------------------------------------------------------------------------------------------------------- results


def format_store(data: Mapping[str, Any]) -> str:
    lines = ["# A full disk during a save", ""]
    lines += [
        f"A save of {data['needed_bytes']:,} bytes on a tmpfs with pages of {data['page_bytes']:,}, cut off for want of"
        f" room at {data['num_offsets']} different offsets, and made again with room {data['num_retries']} times:",
        "",
    ]
    return "\n".join([*lines, *evidence.describe_checks(data["failures"])])


def format_run(data: Mapping[str, Any]) -> str:
    lines = ["# A full disk during a run", "", *evidence.describe_checks(data["failures"]), ""]
    lines += [f"What it said: {data['message']}", "", f"It saved again at step {data['saved_after_step']}."]
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = common.build_plain_parser("Let saves fail on a full disk and see that nothing is lost.")
    parser.add_argument("--num-offsets", type=int, default=100, metavar="N")
    parser.add_argument("--run", action="store_true", help="fill the disk of a real run instead")
    parser.add_argument("--config", type=Path, default=Path(__file__).with_name("small.yaml"), help="of the real run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of the real run")
    parser.add_argument("--work", type=Path, help="where to mount; default: the folder for temporary files")
    return parser


def main() -> int:
    options = build_parser().parse_args()
    if INSIDE not in os.environ:
        return enter_namespace(sys.argv[1:])
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        try:
            data = (run_run if options.run else run_store)(options, Path(folder))
        finally:
            subprocess.run(["umount", "--lazy", str(Path(folder) / "disk")], check=False, stderr=subprocess.DEVNULL)
    text = format_run(data) if options.run else format_store(data)
    return evidence.conclude(options.results, f"{NAME}_run" if options.run else NAME, data, text)


if __name__ == "__main__":
    common.run_main(main)
