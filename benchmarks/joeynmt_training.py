"""Joey NMT 2.3 on a config; run by an interpreter that has it (see `training_peers.run_joeynmt`), without this project.

    PYTHON -I joeynmt_training.py CONFIG.yaml NUM_WARM_UP

Prints as JSON what the other systems of `benchmarks.training` tell of themselves.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from joeynmt.config import load_config, parse_global_args, set_validation_args
from joeynmt.prediction import prepare
from joeynmt.training import TrainManager


class Watched(TrainManager):
    """Its own training; remembers when each step ended, and counts tokens and padding."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.marks: list[tuple[float, int]] = []
        self.num_target = self.num_real = self.num_padded = 0

    def _train_step(self, batch: Any) -> Any:
        pad = self.model.pad_index
        num_target = int((batch.trg != pad).sum())
        self.num_target += num_target
        self.num_real += num_target + int((batch.src != pad).sum())
        self.num_padded += batch.src.numel() + batch.trg.numel()
        return super()._train_step(batch)

    def _log_scores(self, *_: Any) -> None:
        """Called after each step."""
        self.marks.append((time.perf_counter(), self.num_target))


def main() -> None:
    config, num_warm_up = load_config(Path(sys.argv[1])), int(sys.argv[2])
    args = parse_global_args(config, rank=0, mode="train")
    args.model_dir.mkdir(parents=True, exist_ok=True)
    model, train_data, dev_data, _ = prepare(args, rank=0, mode="train")
    trainer = Watched(
        model=model,
        model_dir=args.model_dir,
        device=args.device,
        n_gpu=args.n_gpu,
        rank=0,
        num_workers=args.num_workers,
        autocast=args.autocast,
        seed=args.seed,
        train_args=args.train,
        dev_args=set_validation_args(args.test),
    )
    trainer.train_and_validate(train_data=train_data, valid_data=dev_data)
    (begin, before), (end, after) = trainer.marks[num_warm_up - 1], trainer.marks[-1]
    figures = {
        "tokens_per_second": (after - before) / (end - begin),
        "padding_efficiency": trainer.num_real / trainer.num_padded,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
