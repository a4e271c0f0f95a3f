"""Intervals of what is measured on windows of a text.

Tokens of one window hang together, so the windows are what is counted: an interval is Student's over their means.

Shapes: W windows, N tokens of each, Q questions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A mean with the ends of its 95 % interval, which are None where one window is all there is."""

    value: float
    low: float | None
    high: float | None

    @property
    def is_noise(self) -> bool:
        """Whether zero lies inside."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high

    def map(self, function: Callable[[float], float]) -> Estimate:
        """By a function that grows."""
        low, high = (None if end is None else function(end) for end in (self.low, self.high))
        return Estimate(function(self.value), low, high)


def mean_estimate(values: Array) -> Estimate:
    """Of windows (W, N), or of questions (Q,), each of which then counts for itself."""
    from scipy import stats

    means = values.astype(np.float64)
    if means.ndim == 2:
        means = means.mean(1)
    mean = float(means.mean())
    if len(means) < 2:
        return Estimate(mean, None, None)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(means) - 1) * means.std(ddof=1) / math.sqrt(len(means)))
    return Estimate(mean, mean - half, mean + half)


def perplexity(nats: Array) -> Estimate:
    return mean_estimate(nats).map(math.exp)


def perplexity_change(nats: Array, full: Array) -> Estimate:
    """By what share the perplexity is above the full model's, paired over the same tokens."""
    return mean_estimate(nats.astype(np.float64) - full.astype(np.float64)).map(math.expm1)


def accuracy_change(right: Array, full: Array) -> Estimate:
    """Share of right answers less the full model's, paired over the same questions."""
    return mean_estimate(right.astype(np.float64) - full.astype(np.float64))
