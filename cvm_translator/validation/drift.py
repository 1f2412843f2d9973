"""Slow declines: a one-sided CUSUM (Page 1954) over what each validation has certainly lost against the best.

A decline by a little each time can stay for long where no single validation is certain of a drop beyond the margin.
So the certain part of every drop, its one-sided lower bound, is added up, less an allowance:

    S = max(0, S + lower bound - allowance),    a new best sets S = 0,    S > limit: the quality drifts away

What is added is the lower bound and not the drop itself: the best of many is a lucky one, so a healthy run always
seems to have dropped a little, and a small validation set's noise must not add up to an alarm. Allowance and limit are
shares of the margin. Their defaults were chosen by simulation: benchmarks/reliability/detector.py.
"""

from __future__ import annotations

import numpy as np

from cvm_translator.metrics.base import FloatArray


def accumulate_drift(drift: FloatArray | float, drop_lower_bound: FloatArray | float, allowance: float) -> FloatArray:
    """S after one more validation that is no new best; numbers, or arrays of many runs at once."""
    added = np.asarray(drift) + np.asarray(drop_lower_bound) - allowance
    return np.asarray(np.maximum(0.0, added), dtype=np.float64)
