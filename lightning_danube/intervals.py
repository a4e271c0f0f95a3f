"""Estimates with their confidence intervals, and the ways to make one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
"""Every interval of the package covers the true value with this probability."""
NORMAL_ERRORS = 1.959964
"""Standard errors to each side of a normal interval. Rounded: the results that are kept were made with this value."""


@dataclass(frozen=True)
class Estimate:
    """A value that was measured on a sample, and the ends of its interval.

    Args:
        low, high: None if the sample is too small to have an interval.
        n: the size of the sample.
        method: how the interval was made.
        stderr: the standard error of the value, where a standard error says something.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    method: Literal["student", "normal", "wilson", "bootstrap"]
    stderr: float | None = None

    def __format__(self, spec: str) -> str:
        """The value and its interval, each number in the given format: "0.912 [0.880, 0.940]"."""
        if self.low is None or self.high is None:
            return format(self.value, spec)
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    @property
    def ends(self) -> tuple[float, float]:
        """Low and high of an estimate that has an interval."""
        assert self.low is not None and self.high is not None, "the sample is too small to have an interval"
        return self.low, self.high

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds zero, or there is none."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high

    def map(self, function: Callable[[float], float]) -> Estimate:
        """The estimate of an increasing function of the value."""
        low, high = (None if end is None else function(end) for end in (self.low, self.high))
        return Estimate(function(self.value), low, high, self.n, self.method)


def student(values: ArrayLike) -> Estimate:
    """The mean of independent values, with Student's interval."""
    from scipy import stats

    sample = np.asarray(values, np.float64)
    mean, n = float(sample.mean()), len(sample)
    if n < 2:
        return Estimate(mean, None, None, n, "student")
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * sample.std(ddof=1) / math.sqrt(n))
    return Estimate(mean, mean - half, mean + half, n, "student")


def normal(values: Sequence[float]) -> Estimate:
    """The mean of many independent values, with its standard error and the normal interval."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return Estimate(mean, None, None, n, "normal")
    stderr = statistics.stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - NORMAL_ERRORS * stderr, mean + NORMAL_ERRORS * stderr, n, "normal", stderr)


def wilson(share: float, n: int, stderr: float | None = None) -> Estimate:
    """A share seen in n trials, with Wilson's interval (1927), which is right near 0 and 1 and for few trials too.

    The share need not be a whole number of trials: a tie may count half, which SciPy's version does not allow.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # Rounding may not put the share itself outside, as it does by 1e-18 for no success in 40 trials.
    low, high = min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
    return Estimate(share, low, high, n, "wilson", stderr)


def bootstrap(
    sample: NDArray[Any],
    statistic: Callable[..., Any],
    *,
    resamples: int,
    method: Literal["percentile", "basic"] = "percentile",
    seed: int = 0,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> Estimate:
    """A statistic of a sample, with the interval of the statistic over resampled samples.

    Args:
        statistic: of an array like `sample`; if it takes an `axis`, it is called for many resamples at once.
        limits: the range of the statistic. The interval does not leave the range, and is the whole range for a sample
            of one.
    """
    from scipy import stats

    value, n = float(statistic(sample)), len(sample)
    if n < 2:
        return Estimate(value, *limits, n, "bootstrap")
    found = stats.bootstrap(
        (sample,),
        statistic,
        n_resamples=resamples,
        confidence_level=CONFIDENCE,
        method=method,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Estimate(value, max(limits[0], float(found.low)), min(limits[1], float(found.high)), n, "bootstrap")


def percentiles(value: float, resampled: NDArray[np.float64], n: int) -> Estimate:
    """A value, with the percentile interval of the values that resamples of n observations gave."""
    low, high = np.percentile(resampled, [50 - 50 * CONFIDENCE, 50 + 50 * CONFIDENCE])
    return Estimate(float(value), float(low), float(high), n, "bootstrap")
