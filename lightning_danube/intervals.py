"""Confidence intervals that several tasks report."""

from __future__ import annotations

import math
from statistics import NormalDist

CONFIDENCE = 0.95


def wilson(share: float, count: int) -> tuple[float, float]:
    """The interval of a share seen among `count` trials (Wilson 1927). It holds near 0 and 1 and for few trials.

    The share need not be a whole number of trials: a tie may count half, for which SciPy's version has no place.
    """
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    # Rounding may not put the share itself outside, as it does by 1e-18 for no success in 40 trials.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))
