"""Units: parts of a source. Any process of any machine can make a unit, and writes it into one folder.

A unit's folder holds the shards of its documents, one for each split, and an account. It gets its name by a rename when
it is complete. Its content does not depend on which process makes it. So after a kill only the missing units are made,
and two processes may make the same unit. Documents keep the order of the source.

Which documents are duplicates is known when all units are made. A unit that loses documents is then written a second
time, without them, by any process.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_danube.files import naming_cached, new_folder, read_sealed, write_sealed
from lightning_danube.text.quality import PERMUTATIONS, Benchmarks, Filters, sketches, text_hash
from lightning_danube.text.reading import BadRow, DamagedFile, Document, Span, read_span
from lightning_danube.tokens.encoding import TextEncoder
from lightning_danube.tokens.shards import SPLITS, SplitWriter, held_out_below, split_of
from lightning_danube.tokens.token_sequence import TokenSegment, TokenSequence

SHOWN_REMOVED = 8
"""Most removed documents of a unit that are listed with file and row."""
CONTAMINATED = "shares words with an evaluation set"
_UNIT, _LISTING = "unit.npz", "splits.json"
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 256, 1 << 20


@dataclass(frozen=True)
class Job:
    """Everything except the rows that a process needs to make a unit of a source."""

    building: Path
    column: str
    separator: str | None
    skip_bad_rows: bool
    bos_id: int | None
    eos_id: int
    dtype: str
    in_parts: bool
    held_out: float
    filters: Filters | None
    near: bool
    benchmarks: bool

    def path(self, unit: int) -> Path:
        return self.building / "units" / f"{unit:06d}"

    def path_of_kept(self, unit: int) -> Path:
        """The unit without the documents that are not kept."""
        return self.building / "kept" / f"{unit:06d}"

    @property
    def tokenizer_file(self) -> Path:
        return self.building / "tokenizer.json"

    @property
    def benchmarks_file(self) -> Path:
        return self.building / "benchmarks.npz"


@dataclass
class Unit:
    """The documents of a unit that passed every check of a single document, and counts of the others.

    Args:
        account: also what `shards.json` says of the unit's files.
    """

    lengths: NDArray[np.int64]
    sizes: NDArray[np.int64]  # bytes of text
    hashes: NDArray[np.uint64]
    sketches: NDArray[np.uint32]
    account: dict[str, Any]


def make_unit(job: Job, number: int, rows: Sequence[Span] | Sequence[Document | BadRow]) -> tuple[int, int]:
    """Writes the unit's folder. Returns the number of its documents and tokens.

    Raises:
        DamagedFile: a file cannot be read, or a row cannot be read and bad rows are not skipped.
        ValueError: see `TextEncoder.encode`.
    """
    began = time.monotonic()
    # Not searched for leftovers: there may be thousands of units, and their folder is removed as a whole.
    with new_folder(job.path(number), clear=False) as folder:
        return _write_unit(job, number, rows, folder, began)


def _write_unit(
    job: Job, number: int, rows: Sequence[Span] | Sequence[Document | BadRow], folder: Path, began: float
) -> tuple[int, int]:
    reading = _read(job, rows)
    benchmarks = _benchmarks(str(job.benchmarks_file)) if job.benchmarks else None
    encoder = _encoder(str(job.tokenizer_file), job.in_parts)
    head, tail = [] if job.bos_id is None else [job.bos_id], [job.eos_id]
    filtered: Counter[str] = Counter()
    rejected: list[BadRow] = []
    removed: list[BadRow] = []  # the first documents that a rule removed
    found_rows: set[int] = set()
    found_in: Counter[int] = Counter()  # benchmark file → documents that contain its text
    writers = _writers(job, number, folder)
    border = held_out_below(job.held_out)
    lengths: list[int] = []
    sizes: list[int] = []
    hashes: list[int] = []
    drawn: list[NDArray[np.uint32]] = []
    read = pieces = contaminated = 0
    first: tuple[str, int] | None = None
    last: tuple[str, int] | None = None

    def keep(texts: list[str]) -> None:
        encoded = [np.array([*head, *own, *tail], dtype=job.dtype) for own in encoder.encode(texts)]
        own_hashes = list(map(text_hash, texts))
        for own, hashed in zip(encoded, own_hashes, strict=True):
            writers[split_of(hashed, border)].add(own)
        lengths.extend(map(len, encoded))
        sizes.extend(len(text.encode()) for text in texts)
        hashes.extend(own_hashes)
        if job.near:
            drawn.append(sketches(texts))

    batch: list[str] = []
    characters = 0
    for row in reading:
        if isinstance(row, BadRow):
            if not job.skip_bad_rows:
                raise DamagedFile(row.message)
            rejected.append(row)
            continue
        read += 1
        pieces += last == (row.file, row.row)
        last = (row.file, row.row)
        first = first or last
        rule = job.filters.against(row.text) if job.filters is not None else None
        if rule is not None:
            filtered[rule] += 1
            removed += [_removed(row, f"filter: {rule}")] * (len(removed) < SHOWN_REMOVED)
            continue
        if benchmarks is not None and (found := benchmarks.found_in(row.text)):
            contaminated += 1
            removed += [_removed(row, CONTAMINATED)] * (len(removed) < SHOWN_REMOVED)
            found_rows.update(found)
            found_in.update({benchmarks.place_of(number)[0] for number in found})
            continue
        if batch and (len(batch) == _BATCH_DOCUMENTS or characters + len(row.text) > _BATCH_CHARACTERS):
            keep(batch)
            batch, characters = [], 0
        batch.append(row.text)
        characters += len(row.text)
    if batch:
        keep(batch)
    account = {
        "read": read,
        "cut": pieces,
        "first": first,
        "last": last,
        "filtered": dict(sorted(filtered.items())),
        "rejected": rejected,
        "removed": removed,
        "contaminated": contaminated,
        "found_rows": sorted(found_rows),
        "found_in": {str(file): n for file, n in sorted(found_in.items())},
        "seconds": time.monotonic() - began,
        "splits": {split: writer.close() for split, writer in writers.items()},
    }
    np.savez(
        folder / _UNIT,
        lengths=np.array(lengths, dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int64),
        hashes=np.array(hashes, dtype=np.uint64),
        sketches=np.concatenate(drawn) if drawn else np.empty((0, PERMUTATIONS), dtype=np.uint32),
        account=np.array(json.dumps(account)),
    )
    return len(lengths), sum(lengths)


def write_kept(job: Job, number: int, keep: NDArray[np.bool_]) -> None:
    """Writes a unit again, without the documents that are not kept, unless that is done."""
    if job.path_of_kept(number).exists():
        return
    unit = load_unit(job.path(number))
    border = held_out_below(job.held_out)
    with new_folder(job.path_of_kept(number), clear=False) as folder:
        writers = _writers(job, number, folder)
        streams = {split: _stream(job, job.path(number), unit, split) for split in SPLITS}
        at = dict.fromkeys(SPLITS, 0)
        for length, hashed, wanted in zip(unit.lengths.tolist(), unit.hashes.tolist(), keep, strict=True):
            split = split_of(hashed, border)
            if wanted:
                writers[split].add(streams[split].read(at[split], at[split] + length))
            at[split] += length
        splits = {split: writer.close() for split, writer in writers.items()}
        write_sealed(folder / _LISTING, splits)


def kept_splits(job: Job, number: int) -> dict[str, Any]:
    """Returns what `write_kept` has written, as `shards.json` says it."""
    return read_sealed(job.path_of_kept(number) / _LISTING, f"remove {job.building} to begin again")


def _writers(job: Job, number: int, folder: Path) -> dict[str, SplitWriter]:
    return {split: SplitWriter(folder, f"{split}-{number:05d}", np.dtype(job.dtype)) for split in SPLITS}


def _stream(job: Job, folder: Path, unit: Unit, split: str) -> TokenSequence:
    places = [
        TokenSegment(folder / file["name"], *segment)
        for file in unit.account["splits"][split]["files"]
        for segment in file["segments"]
    ]
    return TokenSequence(places, np.dtype(job.dtype), np.iinfo(job.dtype).max + 1, remedy=f"delete {job.building}")


def _removed(document: Document, cause: str) -> BadRow:
    return BadRow(document.file, document.row, cause, f"{document.file}, row {document.row}: {cause}")


def load_unit(folder: Path) -> Unit:
    path = folder / _UNIT
    with naming_cached(path), np.load(path) as saved:
        account = json.loads(str(saved["account"]))
        for key in ("rejected", "removed"):
            account[key] = [BadRow(*row) for row in account[key]]
        return Unit(saved["lengths"], saved["sizes"], saved["hashes"], saved["sketches"], account)


def load_part(folder: Path, name: str) -> NDArray[Any]:
    """Reads one array of a unit."""
    path = folder / _UNIT
    with naming_cached(path), np.load(path) as saved:
        array: NDArray[Any] = saved[name]
        return array


def _read(job: Job, rows: Iterable[Span] | Iterable[Document | BadRow]) -> Iterator[Document | BadRow]:
    return chain.from_iterable(
        read_span(row, job.column, job.separator) if isinstance(row, Span) else [row] for row in rows
    )


@lru_cache(2)
def _encoder(file: str, in_parts: bool) -> TextEncoder:
    return TextEncoder(Path(file).read_text(encoding="utf-8"), in_parts)


@lru_cache(1)
def _benchmarks(file: str) -> Benchmarks:
    return Benchmarks.load(Path(file))
