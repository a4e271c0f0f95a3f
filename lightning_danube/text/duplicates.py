"""Finds duplicates of earlier documents in bounded memory: data that grow with the documents are on the disk, sorted.

In memory are one byte for each document, and arrays of `RUN` entries. On the disk are 16 bytes for each hash of a
document, and for near-duplicates also the sketches of those documents that share a band with another one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_danube.text.quality import BANDS, NEAR, PERMUTATIONS

RUN = 1 << 22
"""Entries that are sorted in memory at once (64 MiB)."""

Pairs = tuple[NDArray[np.uint64], NDArray[np.int64]]


class SortedRuns:
    """Pairs of a key and a value, sorted by key on the disk. Pairs of one key keep the order in which they were added.

    Args:
        folder: an existing directory. The two files that this writes there are removed by `close`.
        top: every key is below it. Keys should be spread evenly, because each range of keys is sorted in memory.
    """

    def __init__(self, folder: Path, name: str, top: int) -> None:
        self._paths = [folder / f"{name}.keys", folder / f"{name}.values"]
        self._files = [open(path, "wb") for path in self._paths]  # noqa: SIM115
        self._top = top
        self._pending: list[Pairs] = []
        self._pending_pairs = 0
        self._ends = [0]

    def add(self, keys: NDArray[np.uint64], values: NDArray[np.int64]) -> None:
        self._pending.append((keys, values))
        self._pending_pairs += len(keys)
        if self._pending_pairs >= RUN:
            self._write_run()

    def _write_run(self) -> None:
        keys, values = (np.concatenate(part) for part in zip(*self._pending, strict=True))
        order = np.argsort(keys, kind="stable")
        for file, array in zip(self._files, (keys, values), strict=True):
            array[order].tofile(file)
        self._ends.append(self._ends[-1] + len(keys))
        self._pending, self._pending_pairs = [], 0

    def ordered(self) -> Iterator[Pairs]:
        """Yields all pairs in the order of their keys. All pairs of one key come at once."""
        if self._pending_pairs:
            self._write_run()
        for file in self._files:
            file.flush()
        total = self._ends[-1]
        if not total:
            return
        keys, values = (np.memmap(path, dtype, "r") for path, dtype in zip(self._paths, ("u8", "i8"), strict=True))
        begins = self._ends[:-1]
        ranges = -(-total // RUN)
        for number in range(1, ranges + 1):
            border = self._top * number // ranges
            found: list[Pairs] = []
            for run, begin in enumerate(begins):
                rest = keys[begin : self._ends[run + 1]]
                size = len(rest) if number == ranges else int(np.searchsorted(rest, np.uint64(border)))
                found.append((rest[:size], values[begin : begin + size]))
                begins[run] += size
            some_keys, some_values = (np.concatenate(part) for part in zip(*found, strict=True))
            order = np.argsort(some_keys, kind="stable")
            yield some_keys[order], some_values[order]

    def close(self) -> None:
        for file, path in zip(self._files, self._paths, strict=True):
            file.close()
            path.unlink(missing_ok=True)


def drop_exact(keep: NDArray[np.bool_], hashes: Iterable[NDArray[np.uint64]], folder: Path) -> int:
    """Drops the documents whose hash an earlier kept document has. Returns their number.

    Args:
        keep: which documents are kept, (documents,); changed in place.
        hashes: of all documents, in order, in parts of any size.
        folder: for temporary files.
    """
    dropped = 0
    runs = SortedRuns(folder, "exact", 1 << 64)
    try:
        at = 0
        for part in hashes:
            here = np.flatnonzero(keep[at : at + len(part)])
            runs.add(part[here], at + here)
            at += len(part)
        for keys, places in runs.ordered():
            repeated = places[1:][keys[1:] == keys[:-1]]
            keep[repeated] = False
            dropped += len(repeated)
    finally:
        runs.close()
    return dropped


def drop_near(keep: NDArray[np.bool_], sketches: Any, folder: Path) -> int:
    """Drops the documents that are near-duplicates of an earlier kept document. Returns their number.

    Two documents are compared if a band of their sketches agrees, and the earlier one is the first kept document with
    this band. They are near-duplicates if at least `NEAR` of their sketches agree.

    Args:
        keep: see `drop_exact`.
        sketches: a function that yields the sketches of all documents in order, in parts of any size, (part,
            permutations). It is called several times.
        folder: see `drop_exact`.
    """
    buckets = 0
    shared = SortedRuns(folder, "shared", len(keep))
    try:
        for band in range(BANDS):
            runs = SortedRuns(folder, "band", 1 << 64)
            try:
                at = 0
                for part in sketches():
                    here = np.flatnonzero(keep[at : at + len(part)])
                    runs.add(_keys_of(part[here], band), at + here)
                    at += len(part)
                for keys, places in runs.ordered():
                    # Only a band that several documents share can lead to a duplicate.
                    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
                    several = sizes > 1
                    number = np.cumsum(several) - 1 + buckets
                    chosen = several[group]
                    shared.add(places[chosen].astype(np.uint64), number[group[chosen]])
                    buckets += int(several.sum())
            finally:
                runs.close()
        return _drop_sharing(keep, sketches(), shared, buckets, folder) if buckets else 0
    finally:
        shared.close()


def _keys_of(sketches: NDArray[np.uint32], band: int) -> NDArray[np.uint64]:
    """Returns a hash of one band of each sketch, (sketches,)."""
    width = PERMUTATIONS // BANDS
    rows = sketches[:, band * width : (band + 1) * width].astype(np.uint64)
    keys: NDArray[np.uint64] = (rows * _WEIGHTS).sum(axis=1, dtype=np.uint64)
    return keys


_WEIGHTS = np.random.default_rng(0).integers(1, 2**63, PERMUTATIONS // BANDS, dtype=np.uint64) | np.uint64(1)


def _drop_sharing(
    keep: NDArray[np.bool_], parts: Iterable[NDArray[np.uint32]], shared: SortedRuns, buckets: int, folder: Path
) -> int:
    """Goes through the documents that share a band, in order, and drops the near-duplicates.

    Args:
        shared: document → numbers of the bands that it shares.
        buckets: number of shared bands.
    """
    dropped = kept = 0
    size = PERMUTATIONS * 4
    with ExitStack() as stack:
        paths = [folder / name for name in ("first", "sketches")]
        for path in paths:
            stack.callback(path.unlink, missing_ok=True)
        # For each shared band, 1 + the place of its first kept document in the file of sketches; 0 if there is none.
        first = np.memmap(paths[0], np.int64, "w+", shape=(buckets,))
        file = stack.enter_context(open(paths[1], "w+b", buffering=0))
        drawn = _Sequential(parts)
        for keys, numbers in shared.ordered():
            pairs = zip(keys.tolist(), numbers.tolist(), strict=True)
            for place, group in groupby(pairs, key=lambda pair: pair[0]):
                own = [number for _, number in group]
                sketch = drawn.at(place)
                earlier = {int(first[number]) for number in own} - {0}
                read = (np.frombuffer(os.pread(file.fileno(), size, (one - 1) * size), np.uint32) for one in earlier)
                if any(np.mean(other == sketch) >= NEAR for other in read):
                    keep[place] = False
                    dropped += 1
                    continue
                file.write(sketch.tobytes())
                kept += 1
                for number in own:
                    if not first[number]:
                        first[number] = kept
    return dropped


class _Sequential:
    """Rows of parts that are asked for in ascending order."""

    def __init__(self, parts: Iterable[NDArray[np.uint32]]) -> None:
        self._parts = iter(parts)
        self._begin, self._part = 0, np.empty((0, PERMUTATIONS), np.uint32)

    def at(self, place: int) -> NDArray[np.uint32]:
        while place >= self._begin + len(self._part):
            self._begin += len(self._part)
            self._part = next(self._parts)
        row: NDArray[np.uint32] = self._part[place - self._begin]
        return row
