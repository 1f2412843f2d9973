"""Loss spikes, judged against a robust window.

The window holds the last accepted losses; a rejected value never enters it, so one spike cannot hide the next, and a
run whose every loss is bad keeps being told so. Deviations are measured in robust units, 1.4826 times the median
absolute deviation (MAD), which equals the standard deviation for normal noise.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

MIN_HISTORY = 20


class SpikeWindow:
    """Tells whether a loss is finite and not far above what the last ones were."""

    def __init__(self, num_steps: int, threshold: float) -> None:
        self.threshold = threshold
        self._losses: deque[float] = deque(maxlen=num_steps)

    def admits(self, loss: float) -> bool:
        """Judge a loss, without taking it in."""
        return math.isfinite(loss) and loss <= self.find_limit()

    def find_limit(self) -> float:
        """The largest loss that is admitted now; infinity where there is too little to judge by."""
        if len(self._losses) < MIN_HISTORY:
            return math.inf
        median = statistics.median(self._losses)
        mad = statistics.median(abs(value - median) for value in self._losses)
        # The floor keeps a window of nearly equal losses from calling ordinary noise a spike.
        scale = max(1.4826 * mad, 0.05 * abs(median), 1e-6)
        return median + self.threshold * scale

    def add(self, loss: float) -> None:
        self._losses.append(loss)

    def state_dict(self) -> dict[str, Any]:
        return {"losses": list(self._losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses.clear()
        self._losses.extend(state["losses"])
