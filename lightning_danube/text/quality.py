"""Decides which documents are kept: rules for prose, duplicates, and benchmark contamination.

The result depends only on the texts and their order, not on the number of processes or machines. Steps that need one
document (rules, benchmarks, the sketch of its words) run where the document is read. Duplicates need all documents, so
they are removed when the parts of a source are joined.
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
from lightning_danube.files import naming_cached
from lightning_danube.text.reading import BadRow, DamagedFile, format_of, read_rows

Deduplicate = Literal["none", "exact", "near"]
WORDS = re.compile(r"\w+")

NGRAM = 13
"""Number of consecutive benchmark words that mark a document as contaminated, as in GPT-3 (arXiv 2005.14165)."""
SHORTEST_TEXT = 8
"""Words. A benchmark text of 8 to 12 words must occur completely in a document; a shorter text proves nothing."""

NEAR = 0.8
"""Lowest estimated Jaccard similarity of five-word shingles at which two documents are near-duplicates."""
PERMUTATIONS, BANDS, _SHINGLE = 128, 16, 5
# Two documents are compared if all 8 values of at least one of 16 bands agree. This holds for 95 % of the pairs with
# similarity 0.8, for more than 99.9 % at 0.9, and for 6 % at 0.5.


@dataclass(frozen=True)
class Filters:
    """Rules for prose, based on Gopher's (arXiv 2112.11446, table A1). A kept document passes all rules.

    Args:
        min_words: minimum number of words in a document.
        max_words: maximum number of words in a document.
        min_alphabetic: minimum share of words that contain a letter.
        max_symbols: maximum number of "#" and "…" per word.
        max_repeated_lines: maximum share of lines that repeat an earlier line of the document.
    """

    min_words: int = 50
    max_words: int = 100_000
    min_alphabetic: float = 0.8
    max_symbols: float = 0.1
    max_repeated_lines: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.min_words <= self.max_words:
            raise ValueError(
                f"data.filters.min_words is {self.min_words}, max_words {self.max_words}: give 0 or more, and a "
                "maximum that is not below the minimum"
            )
        for name in ("min_alphabetic", "max_repeated_lines"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.filters.{name} is {getattr(self, name)}: give a share between 0 and 1")
        if self.max_symbols < 0:
            raise ValueError(f"data.filters.max_symbols is {self.max_symbols}: it must not be negative")

    def against(self, text: str) -> str | None:
        """Returns the first rule that a text breaks, or None."""
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
    """The quality options of `data`, which apply to all its sources."""

    deduplicate: Deduplicate = "none"
    filters: Filters | None = None
    decontaminate: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.deduplicate == "near":
            need("dedup", "data.deduplicate: near")

    def identity(self, filtered: bool) -> list[Any]:
        """Returns everything that determines which documents are kept. Benchmark files count by their content."""
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
    """Returns a 64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def sketches(texts: Sequence[str]) -> NDArray[np.uint32]:
    """Returns the MinHash of each text's five-word shingles, (texts, permutations)."""
    from rensa import RMinHash

    rows = RMinHash.digests_from_token_sets([_shingles(text) for text in texts], PERMUTATIONS, 0)
    return np.array(rows, dtype=np.uint32).reshape(len(texts), PERMUTATIONS)


def _shingles(text: str) -> list[str]:
    words = WORDS.findall(text.lower())
    return list({" ".join(words[at : at + _SHINGLE]) for at in range(max(1, len(words) - _SHINGLE + 1))})


# --- benchmarks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BenchmarkFile:
    """Number of rows of a benchmark file, and number of rows that are too short to search for."""

    file: str
    rows: int
    rows_too_short: int


class Benchmarks:
    """Word n-grams of benchmarks, to search for in documents.

    Each text of a row (question, choices, passage, answer) is searched for separately, in lower case, words only. A
    text of fewer than `NGRAM` words must occur as a whole.
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
        # One flag for the low 24 bits of every n-gram. One look-up rules out nearly all n-grams of a document.
        self._maybe = np.zeros(1 << 24, dtype=bool)
        self._maybe[(grams & np.uint64(0xFFFFFF)).astype(np.int64)] = True
        self._words: dict[str, int] = {}
        self._first_rows = np.cumsum([0, *(file.rows for file in files)])

    @classmethod
    def read(cls, paths: Sequence[str]) -> Benchmarks:
        """Reads jsonl or parquet files, plain or compressed.

        Raises:
            ValueError: a file has another format, cannot be read, or holds no text that is long enough.
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
        with naming_cached(path), np.load(path) as saved:
            files = [BenchmarkFile(**file) for file in json.loads(str(saved["files"]))]
            return cls(files, saved["grams"], saved["rows"], saved["lengths"])

    def place_of(self, row: int) -> tuple[int, int]:
        """Converts a row's number over all files to (number of the file, row in the file from 0)."""
        file = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return file, row - int(self._first_rows[file])

    def found_in(self, text: str) -> list[int]:
        """Returns the numbers of the benchmark rows that share an n-gram with a text, ascending."""
        rows: set[int] = set()
        for length, grams in self.grams_of(text, whole=False):
            known, numbers = self._grams[length], self._rows[length]
            likely = grams[self._maybe[(grams & np.uint64(0xFFFFFF)).astype(np.int64)]]
            begins, ends = np.searchsorted(known, likely, "left"), np.searchsorted(known, likely, "right")
            for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
                rows.update(numbers[begin:end].tolist())
        return sorted(rows)

    def grams_of(self, text: str, *, whole: bool) -> Iterator[tuple[int, NDArray[np.uint64]]]:
        """Yields (length, hashes) of a text's word n-grams.

        Args:
            whole: whether the text is a benchmark's. Then the length is `NGRAM`, or all words of a shorter text. Else
                every length that occurs in the benchmarks is used.
        """
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
            # Modulo 2**64. An odd factor is invertible, so no information is lost.
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
    if format_of(path) not in ("jsonl", "parquet"):
        raise ValueError(f"data.decontaminate: {path} is neither jsonl nor parquet, plain or with .gz or .zst")
    try:
        for _, values in read_rows(path):
            if isinstance(values, BadRow):
                raise DamagedFile(values.message)
            yield values
    except DamagedFile as error:
        raise DamagedFile(f"data.decontaminate: {error}") from error


def _texts(values: Any) -> Iterable[str]:
    if isinstance(values, str):
        yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _texts(value)
    elif isinstance(values, list):
        for value in values:
            yield from _texts(value)
