"""Computes the source and the row of the n-th sample of a stage.

Both are pure functions of the position, so a resumed run needs no further state:

* `Mixture` spreads the sources of one stage evenly. The shares become whole counts in a block (largest remainder).
  Inside the block, the k-th sample of a source must fall between its ideal times k/share and (k+1)/share.
  Earliest-deadline-first always achieves this (Baruah et al. 1996, "Proportionate progress"). After *any* number of
  samples, every source is less than one sample away from its share.
* `permute` shuffles the rows of one epoch without a permutation array. A Feistel network is a bijection on a power of
  four, and cycle walking restricts it to any size (Black & Rogaway 2002). An epoch over trillions of tokens needs no
  memory, and the cost of a sample does not depend on its position.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from lightning_danube.training.passes import IntArray

LARGEST_BLOCK = 10_000
"""Largest number of samples in a block: shares are then exact to 0.01 %."""


def whole_counts(shares: Mapping[str, float], largest_block: int = LARGEST_BLOCK) -> dict[str, int]:
    """Returns the samples of each source in one block.

    The block is the smallest in which all shares are whole numbers, but has at most `largest_block` samples.

    Args:
        shares: source → weight, with any positive sum (percent, fractions, tokens).

    Raises:
        ValueError: a share is less than one sample of a block.
    """
    exact = {name: Fraction(str(float(share))) for name, share in shares.items()}
    total = sum(exact.values())
    exact = {name: share / total for name, share in exact.items()}
    block = math.lcm(*(share.denominator for share in exact.values()))
    if block > largest_block:
        block = largest_block
    counts = {name: int(share * block) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name] * block, -exact[name]))
    for name in by_remainder[: block - sum(counts.values())]:
        counts[name] += 1
    for name, share in exact.items():
        if share > 0 and counts[name] == 0:
            raise ValueError(
                f"the share of source {name!r} is {float(share):.2g} of its stage; "
                f"the smallest share a stage can hold is 1/{block}: raise it, or leave the source out"
            )
    return counts


class Mixture:
    """The order of sources in one stage; it repeats after each block.

    Args:
        shares: source → weight, in the order of the source numbers. A weight of 0 is allowed.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        self.sources = tuple(shares)
        counts = whole_counts(shares)
        self.counts = np.array([counts[name] for name in self.sources], dtype=np.int64)
        self.block = int(self.counts.sum())
        self._order = _even_order([int(count) for count in self.counts])
        one_hot = self._order[:, None] == np.arange(len(self.sources))[None, :]
        # _before[n, s]: samples of source s among the first n of a block, n from 0 to the block itself.
        self._before = np.zeros((self.block + 1, len(self.sources)), dtype=np.int64)
        np.cumsum(one_hot, axis=0, out=self._before[1:])

    def sources_at(self, positions: IntArray) -> IntArray:
        """Returns the number of the source at each position, (n,) → (n,)."""
        return self._order[positions % self.block]

    def taken_before(self, positions: IntArray) -> IntArray:
        """Returns the samples of every source before each position, (n,) → (n, sources)."""
        blocks, rest = np.divmod(positions, self.block)
        return blocks[:, None] * self.counts[None, :] + self._before[rest]


def _even_order(counts: list[int]) -> IntArray:
    """Returns the source number at each position of a block, with every source spread evenly."""
    block = sum(counts)
    releases: list[tuple[int, int, int]] = [(0, source, 0) for source, count in enumerate(counts) if count]
    ready: list[tuple[int, int, int]] = []
    order = np.empty(block, dtype=np.int64)
    heapq.heapify(releases)
    for place in range(block):
        while releases and releases[0][0] <= place:
            _, source, k = heapq.heappop(releases)
            deadline = -(-(k + 1) * block // counts[source])
            heapq.heappush(ready, (deadline, source, k))
        deadline, source, k = heapq.heappop(ready)
        assert place < deadline, "earliest deadline first meets every deadline at full utilisation"
        order[place] = source
        if k + 1 < counts[source]:
            heapq.heappush(releases, ((k + 1) * block // counts[source], source, k + 1))
    return order
