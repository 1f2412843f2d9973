"""Where each thing lies in a run folder. The names are fixed: observers and scripts read them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunLayout:
    """The paths of one run folder; nothing is created by asking for them."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def lock(self) -> Path:
        return self.root / "run.lock"

    @property
    def supervisor_lock(self) -> Path:
        """Held by the supervisor as long as it keeps the run alive; the run itself is held through `lock`."""
        return self.root / "supervisor.lock"

    @property
    def control(self) -> Path:
        return self.root / "control.json"

    @property
    def micro_batches(self) -> Path:
        return self.root / "micro_batches.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def train_log(self) -> Path:
        return self.logs / "train.log"

    @property
    def events(self) -> Path:
        return self.logs / "events.jsonl"

    @property
    def corpus(self) -> Path:
        return self.root / "corpus"

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def teacher(self) -> Path:
        return self.root / "teacher"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def validation(self) -> Path:
        return self.root / "validation"

    @property
    def student(self) -> Path:
        return self.root / "student"

    @property
    def reports(self) -> Path:
        return self.root / "reports"

    @property
    def plots(self) -> Path:
        return self.reports / "plots"

    @property
    def final_report(self) -> Path:
        return self.reports / "final_report.json"

    @property
    def monitor(self) -> Path:
        return self.root / "monitor"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def stages(self) -> Path:
        """Completion records of the stages that keep none of their own."""
        return self.root / "stages"
