"""Random access into a shuffled pass: a keyed permutation, computed at any position."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def permute(positions: IntArray, size: int, *, seed: int, stream: str, epoch: int) -> IntArray:
    """Rows visited at `positions` of one pass: a bijection of range(size) for each (seed, stream, epoch).

    Args:
        positions: (n,) integers in [0, size).
        stream: what is shuffled, for example a source's name, so that equal sizes do not mean equal orders.
        epoch: number of the pass; each has its own order.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, stream, epoch)
    rows = positions.astype(np.uint64)
    rows = _feistel(rows, half_bits, keys)
    outside = np.flatnonzero(rows >= size)
    while outside.size:
        rows[outside] = _feistel(rows[outside], half_bits, keys)
        outside = outside[rows[outside] >= size]
    return rows.astype(np.int64)


@lru_cache(maxsize=1024)
def _round_keys(seed: int, stream: str, epoch: int) -> tuple[np.uint64, ...]:
    digest = hashlib.blake2b(f"{seed}/{epoch}/{stream}".encode(), digest_size=48).digest()
    return tuple(np.frombuffer(digest, dtype="<u8"))


def _feistel(values: NDArray[np.uint64], half_bits: int, keys: tuple[np.uint64, ...]) -> NDArray[np.uint64]:
    """Six rounds over two halves of `half_bits` bits; the round function is the finaliser of splitmix64."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        mixed = right + key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << shift) | right
