"""Which documents are kept: rules for prose, duplicates, and texts of benchmarks.

Everything here is a function of the texts and their order alone, whatever the number of processes or machines. What a
single document decides (rules, benchmarks, the sketch of its words) is worked out where it is read; what needs all of
them (duplicates) when the parts of a source are joined.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lightning_danube.extras import need
from lightning_danube.text.reading import DamagedFile, format_of, open_bytes

Deduplicate = Literal["none", "exact", "near"]
WORDS = re.compile(r"\w+")

NGRAM = 13
"""Words of a benchmark's text that are contamination when a document holds them, as in GPT-3 (arXiv 2005.14165)."""
SHORTEST_TEXT = 8
"""Words. A benchmark's text of 8 to 12 words counts when a document holds all of it; a shorter one proves nothing."""

NEAR = 0.8
"""Estimated share of common five-word shingles (Jaccard) from which two documents are near-duplicates."""
_PERMUTATIONS, _BANDS, _SHINGLE = 128, 16, 5
# Two documents are compared if all 8 values of one band of 16 agree: at a share of 0.8 that happens to 95 % of pairs,
# at 0.9 to more than 99.9 %, at 0.5 to 6 %.


@dataclass(frozen=True)
class Filters:
    """Rules for prose after Gopher's (arXiv 2112.11446, table A1); a document has to pass them all.

    Args:
        min_words: fewest words.
        max_words: most words.
        min_alphabetic: least share of words that hold a letter.
        max_symbols: most "#" and "…" for each word.
        max_repeated_lines: largest share of lines that stood in the document before.
    """

    min_words: int = 50
    max_words: int = 100_000
    min_alphabetic: float = 0.8
    max_symbols: float = 0.1
    max_repeated_lines: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.min_words <= self.max_words:
            raise ValueError(
                f"data.filters.min_words is {self.min_words}, max_words {self.max_words}: give 0 or more, and no less"
            )
        for name in ("min_alphabetic", "max_repeated_lines"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.filters.{name} is {getattr(self, name)}: give a share between 0 and 1")
        if self.max_symbols < 0:
            raise ValueError(f"data.filters.max_symbols is {self.max_symbols}: it must not be negative")

    def against(self, text: str) -> str | None:
        """The rule that a text breaks, None if it breaks none."""
        words = text.split()
        if len(words) < self.min_words:
            return "too few words"
        if len(words) > self.max_words:
            return "too many words"
        if sum(any(map(str.isalpha, word)) for word in words) < self.min_alphabetic * len(words):
            return "too few words with letters"
        if text.count("#") + text.count("…") + text.count("...") > self.max_symbols * len(words):
            return "too many symbols"
        lines = [line for line in map(str.strip, text.splitlines()) if line]
        if len(lines) - len(set(lines)) > self.max_repeated_lines * len(lines):
            return "repeated lines"
        return None


@dataclass(frozen=True)
class Quality:
    """What `data` asks of all its sources."""

    deduplicate: Deduplicate = "none"
    filters: Filters | None = None
    decontaminate: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.deduplicate == "near":
            need("dedup", "data.deduplicate: near")

    def identity(self, filtered: bool) -> list[Any]:
        """All that decides which documents are kept; a benchmark's file counts by its content."""
        filters = vars(self.filters) if self.filters is not None and filtered else None
        return [self.deduplicate, filters, [_digest_of(file) for file in self.decontaminate]]


def _digest_of(file: str) -> str:
    try:
        with open(file, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"data.decontaminate names {file}, which cannot be read: {error.strerror}") from error


# --- duplicates -------------------------------------------------------------------------------------------------------


def text_hash(text: str) -> int:
    """64 bits of a text's content."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def sketches(texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash of each text's five-word shingles, (texts, permutations)."""
    from rensa import RMinHash

    rows = RMinHash.digests_from_token_sets([_shingles(text) for text in texts], _PERMUTATIONS, 0)
    return np.array(rows, dtype=np.uint32).reshape(len(texts), _PERMUTATIONS)


def _shingles(text: str) -> list[str]:
    words = WORDS.findall(text.lower())
    return list({" ".join(words[at : at + _SHINGLE]) for at in range(max(1, len(words) - _SHINGLE + 1))})


def first_of_each(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which values stand for the first time, in order."""
    first = np.zeros(len(hashes), dtype=bool)
    first[np.unique(hashes, return_index=True)[1]] = True
    return first


class NearDuplicates:
    """Finds a document that is nearly an earlier one, by its sketch. Takes about 2 kB of memory a document."""

    # Not rensa.RMinHashLSH: it is filled from texts only, and these sketches come from files. It returns every document
    # of a bucket, not the first one, so shards that exist already would hold other documents than new ones.

    def __init__(self) -> None:
        self._kept: list[NDArray[np.uint32]] = []
        self._bands: list[dict[int, int]] = [{} for _ in range(_BANDS)]
        self._weights = np.random.default_rng(0).integers(1, 2**63, _PERMUTATIONS // _BANDS, dtype=np.uint64) | 1

    def repeats(self, sketch: NDArray[np.uint32]) -> bool:
        """Whether the document is nearly an earlier one that was kept; if it is not, it is kept."""
        rows = sketch.reshape(_BANDS, -1).astype(np.uint64)
        keys = (rows * self._weights).sum(axis=1, dtype=np.uint64).tolist()
        candidates = {band[key] for band, key in zip(self._bands, keys, strict=True) if key in band}
        if any(np.mean(self._kept[candidate] == sketch) >= NEAR for candidate in sorted(candidates)):
            return True
        for band, key in zip(self._bands, keys, strict=True):
            band.setdefault(key, len(self._kept))
        self._kept.append(sketch.copy())
        return False


# --- benchmarks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchmarkFile:
    """How many rows of a benchmark's file there are, and how many are too short to be looked for."""

    file: str
    rows: int
    rows_too_short: int


class Benchmarks:
    """Word n-grams of evaluation sets, to be found in documents.

    Each text of a row (question, choices, passage, answer) is taken by itself, in lower case, words only. A row's text
    of fewer than `NGRAM` words is looked for as a whole.
    """

    def __init__(
        self, files: list[BenchmarkFile], grams: NDArray[np.uint64], rows: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> None:
        self.files = files
        self._lengths = sorted({int(length) for length in lengths})
        self._grams, self._rows = {}, {}
        for length in self._lengths:
            chosen = lengths == length
            order = np.argsort(grams[chosen], kind="stable")
            self._grams[length] = grams[chosen][order]
            self._rows[length] = rows[chosen][order]
        self._all = (grams, rows, lengths)
        # One bit for the low 24 bits of every gram: nearly all of a document's are ruled out by one look.
        self._maybe = np.zeros(1 << 24, dtype=bool)
        self._maybe[(grams & np.uint64(0xFFFFFF)).astype(np.int64)] = True
        self._words: dict[str, int] = {}
        self._first_rows = np.cumsum([0, *(file.rows for file in files)])

    @classmethod
    def read(cls, paths: Sequence[str]) -> Benchmarks:
        """Reads jsonl or parquet files, plain or compressed.

        Raises:
            ValueError: a file is of another format, cannot be read or holds no text that is long enough.
        """
        empty = cls([], *_no_grams())
        files, grams, rows, lengths, first = [], [], [], [], 0
        for path in paths:
            count = too_short = 0
            for values in _benchmark_rows(path):
                found = False
                for text in _texts(values):
                    for length, values_of in empty.grams_of(text, whole=True):
                        found = True
                        grams.append(values_of)
                        rows.append(np.full(len(values_of), first + count, dtype=np.int64))
                        lengths.append(np.full(len(values_of), length, dtype=np.int64))
                count += 1
                too_short += not found
            if count == too_short:
                raise ValueError(f"data.decontaminate: {path} holds no text of at least {SHORTEST_TEXT} words")
            files.append(BenchmarkFile(path, count, too_short))
            first += count
        return cls(files, np.concatenate(grams), np.concatenate(rows), np.concatenate(lengths))

    def save(self, path: Path) -> None:
        grams, rows, lengths = self._all
        files = json.dumps([vars(file) for file in self.files])
        with open(path, "wb") as file:
            np.savez(file, grams=grams, rows=rows, lengths=lengths, files=np.array(files))

    @classmethod
    def load(cls, path: Path) -> Benchmarks:
        with np.load(path) as saved:
            files = [BenchmarkFile(**file) for file in json.loads(str(saved["files"]))]
            return cls(files, saved["grams"], saved["rows"], saved["lengths"])

    def place_of(self, row: int) -> tuple[int, int]:
        """(file's number, row in it from 0) of a row's number over all files."""
        file = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return file, row - int(self._first_rows[file])

    def found_in(self, text: str) -> list[int]:
        """Numbers of the benchmark rows that share an n-gram with a text, ascending."""
        rows: set[int] = set()
        for length, grams in self.grams_of(text, whole=False):
            known, numbers = self._grams[length], self._rows[length]
            likely = grams[self._maybe[(grams & np.uint64(0xFFFFFF)).astype(np.int64)]]
            begins, ends = np.searchsorted(known, likely, "left"), np.searchsorted(known, likely, "right")
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
                rows.update(numbers[begin:end].tolist())
        return sorted(rows)

    def grams_of(self, text: str, *, whole: bool) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """(length, hashes) of a text's word n-grams: of every length that benchmarks have, or, for a benchmark's own
        text, of `NGRAM` words, or of all its words if they are fewer."""
        words = self._hashes(WORDS.findall(text.lower()))
        lengths = self._lengths
        if whole:
            lengths = [min(NGRAM, len(words))] if len(words) >= SHORTEST_TEXT else []
        if not lengths or len(words) < lengths[0]:
            return
        grams = words.copy()
        for length in range(2, lengths[-1] + 1):
            if length > len(words):
                return
            # Mod 2**64; an odd factor loses nothing.
            grams = grams[: len(words) - length + 1] * _FACTOR + words[length - 1 :]
            if length in lengths:
                yield length, grams

    def _hashes(self, words: list[str]) -> NDArray[np.uint64]:
        known = self._words
        if len(known) > 1_000_000:
            known.clear()
        for word in set(words):
            if word not in known:
                known[word] = text_hash(word)
        return np.fromiter((known[word] for word in words), dtype=np.uint64, count=len(words))


_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def _no_grams() -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
    return np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64)


def _benchmark_rows(path: str) -> Iterator[Any]:
    kind = format_of(path)
    if kind == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            yield from pq.read_table(path).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"data.decontaminate: {path} is not a whole parquet file ({error})") from error
        return
    if kind != "jsonl":
        raise ValueError(f"data.decontaminate: {path} is neither jsonl nor parquet, plain or with .gz or .zst")
    with open_bytes(path) as content:
        row = 0
        while line := content.readline(1 << 26):
            row += 1
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise DamagedFile(f"data.decontaminate: {path}, row {row}: not JSON ({error})") from error


def _texts(values: Any) -> Iterable[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _texts(value)
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value)
