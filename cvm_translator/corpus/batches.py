"""The order in which sentences are seen: shuffled epochs of length-bucketed batches, resumable to the exact batch.

Epoch e of stream s is a function of (seed, s, e) alone: a permutation, cut into pools of about 50 batches, each pool
sorted by length and cut into batches of exactly `batch_size` sentences, the batches shuffled over the whole epoch.
The sentences that do not fill a last batch sit out that epoch (others the next); a corpus smaller than one batch is one
batch. Another stream gives other epochs: that is how a rollback continues on other data.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BATCHES_PER_POOL = 50


class BatchSchedule:
    """An endless sequence of batches of sentence indices."""

    def __init__(self, lengths: NDArray[np.int64], batch_size: int, seed: int, stream: int = 0) -> None:
        """`lengths`: (N, 2) tokens of source and target."""
        if len(lengths) == 0 or batch_size < 1:
            raise ValueError(f"no batches of {batch_size} from {len(lengths)} sentences")
        ordered = np.sort(np.asarray(lengths, dtype=np.int64), axis=1)
        self._cost = (ordered[:, 1] << 20) + ordered[:, 0]  # the longer side first: least padding on both
        self._batch_size = batch_size
        self._seed = seed
        self._stream = stream
        self._epoch = 0
        self._cursor = 0
        self._batches = self._make_epoch()

    @property
    def num_batches_per_epoch(self) -> int:
        return max(1, len(self._cost) // self._batch_size)

    @property
    def epoch(self) -> int:
        return self._epoch

    @property
    def stream(self) -> int:
        return self._stream

    def next(self) -> NDArray[np.int64]:
        """Indices of the next batch."""
        if self._cursor == len(self._batches):
            self._epoch += 1
            self._cursor = 0
            self._batches = self._make_epoch()
        batch = self._batches[self._cursor]
        self._cursor += 1
        return batch

    def change_stream(self, stream: int) -> None:
        """Go on with the epochs of another stream, from its beginning."""
        self._stream, self._epoch, self._cursor = stream, 0, 0
        self._batches = self._make_epoch()

    def state_dict(self) -> dict[str, int]:
        return {
            "seed": self._seed,
            "stream": self._stream,
            "epoch": self._epoch,
            "cursor": self._cursor,
        } | self._shape()

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue exactly where `state` was taken; one of another corpus or batch size is refused."""
        for name, value in self._shape().items():
            if state[name] != value:
                raise ValueError(f"the data position was saved with {name} {state[name]}, now it is {value}")
        self._seed, self._stream = state["seed"], state["stream"]
        self._epoch, self._cursor = state["epoch"], state["cursor"]
        self._batches = self._make_epoch()
        if not 0 <= self._cursor <= len(self._batches):
            raise ValueError(f"the data position {self._cursor} lies outside an epoch of {len(self._batches)} batches")

    def _shape(self) -> dict[str, int]:
        return {"num_sentences": len(self._cost), "batch_size": self._batch_size}

    def _make_epoch(self) -> list[NDArray[np.int64]]:
        generator = np.random.default_rng([self._seed, self._stream, self._epoch])
        order = generator.permutation(len(self._cost))
        if len(order) < self._batch_size:
            return [order]
        order = order[: len(order) // self._batch_size * self._batch_size]
        pool_size = BATCHES_PER_POOL * self._batch_size
        batches: list[NDArray[np.int64]] = []
        for begin in range(0, len(order), pool_size):
            pool = order[begin : begin + pool_size]
            pool = pool[np.argsort(self._cost[pool], kind="stable")]
            batches += np.split(pool, len(pool) // self._batch_size)
        return [batches[index] for index in generator.permutation(len(batches))]
