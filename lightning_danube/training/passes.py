"""The order of rows in one epoch over a data set: a shuffle with random access, and the rows of each batch."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
PACKED_TOGETHER = 1024
"""Conversations that are packed together: enough to fill rows well, few enough that rows stay random."""


BATCHES_SORTED_TOGETHER = 50


@dataclass(frozen=True)
class Pass:
    """The plan of one epoch over conversations: each row lists conversation numbers; empty rows pad the last step."""

    rows: list[list[int]]
    batch_rows: int

    @property
    def steps(self) -> int:
        return len(self.rows) // self.batch_rows


def packed_pass(lengths: NDArray[np.int64], context_length: int, batch_rows: int, seed: int, number: int) -> Pass:
    """Returns the plan of an epoch with several conversations per row.

    They are packed by best fit, the longest of each group first.

    Args:
        lengths: tokens of each conversation in a row, (n,).
    """
    chats = _shuffled(len(lengths), seed, "conversations", number)
    rows: list[list[int]] = []
    for start in range(0, len(chats), PACKED_TOGETHER):
        group = chats[start : start + PACKED_TOGETHER]
        room: list[tuple[int, int]] = []  # (places left, row), sorted
        for chat in group[np.argsort(-lengths[group], kind="stable")].tolist():
            place = bisect_left(room, (int(lengths[chat]), 0))
            if place == len(room):
                left, row = context_length, len(rows)
                rows.append([])
            else:
                left, row = room.pop(place)
            rows[row].append(chat)
            insort(room, (left - int(lengths[chat]), row))
    return _whole_steps([rows[row] for row in _shuffled(len(rows), seed, "rows", number)], batch_rows)


def bucketed_pass(lengths: NDArray[np.int64], context_length: int, batch_rows: int, seed: int, number: int) -> Pass:
    """Returns the plan of an epoch with one conversation per row.

    The rows of a step have similar lengths, so padding is small.
    """
    chats = _shuffled(len(lengths), seed, "conversations", number)
    chunk = batch_rows * BATCHES_SORTED_TOGETHER
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(chats), chunk):
        part = chats[start : start + chunk]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch_rows] for i in range(0, len(part), batch_rows)]
    last = [batches.pop()] if len(batches[-1]) < batch_rows else []
    order = _shuffled(len(batches), seed, "batches", number)
    rows = [[int(chat)] for batch in [*(batches[i] for i in order), *last] for chat in batch]
    return _whole_steps(rows, batch_rows)


LAYOUTS: dict[str, Callable[[NDArray[np.int64], int, int, int, int], Pass]] = {
    "packed": packed_pass,
    "bucketed": bucketed_pass,
}


def _shuffled(size: int, seed: int, stream: str, number: int) -> NDArray[np.int64]:
    if not size:
        return np.zeros(0, dtype=np.int64)
    return permute(np.arange(size, dtype=np.int64), size, seed=seed, stream=stream, epoch=number)


def _whole_steps(rows: list[list[int]], batch_rows: int) -> Pass:
    return Pass(rows + [[] for _ in range(-len(rows) % batch_rows)], batch_rows)


def permute(positions: IntArray, size: int, *, seed: int, stream: str, epoch: int) -> IntArray:
    """Returns the rows at `positions` of one epoch, (n,): a bijection of range(size) for each (seed, stream, epoch).

    Args:
        positions: (n,) integers in [0, size).
        stream: name of the shuffled data, for example a source. Different names give different orders.
        epoch: number of the epoch; each epoch has its own order.
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
    """Applies a Feistel network of six rounds to two halves of `half_bits` bits.

    The round function is the finaliser of splitmix64.
    """
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        mixed = right + key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << shift) | right
