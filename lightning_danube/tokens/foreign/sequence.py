"""The ids of foreign token files as one sequence, and as a source of a run."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lightning_danube.outside.secrets import redacted
from lightning_danube.tokens.foreign.layout import TokenFile, TokenFormat
from lightning_danube.tokens.foreign.ranges import ByteRanges
from lightning_danube.tokens.token_sequence import TokenSequence
from lightning_danube.tokens.tokenizer import DocumentTokenizer

WINDOWS = 256
"""Windows in which ids are counted, if a source has more ids than `COUNTED`."""
COUNTED = 1 << 24
"""Ids of a source that are counted at most."""


class Piece(NamedTuple):
    """The ids [start, stop) of a file."""

    file: TokenFile
    start: int
    stop: int


class ForeignSequence(TokenSequence):
    """Ids of pieces of foreign files as one sequence, in the type of the tokenizer's ids.

    A read touches only its bytes. Every id is compared with the vocabulary when it is read.
    """

    def __init__(
        self, kind: TokenFormat, ranges: ByteRanges, pieces: list[Piece], tokenizer: DocumentTokenizer
    ) -> None:
        self._kind, self._ranges, self._pieces = kind, ranges, pieces
        self._name, self.vocab_size, self.dtype = tokenizer.name, tokenizer.vocab_size, tokenizer.dtype
        self._ends = list(accumulate((piece.stop - piece.start for piece in pieces), initial=0))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Returns tokens [start, stop).

        Raises:
            ValueError: a file cannot be read, or an id is not in the vocabulary.
        """
        assert 0 <= start <= stop <= len(self)
        number = bisect_right(self._ends, start) - 1
        parts = []
        while start < stop:
            offset, end = self._ends[number], min(stop, self._ends[number + 1])
            if start < end:
                first = self._pieces[number].start - offset
                parts.append(self._checked(self._pieces[number].file, first + start, first + end))
            start, number = end, number + 1
        if len(parts) == 1:
            return parts[0]
        return np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)

    def _checked(self, file: TokenFile, start: int, stop: int) -> NDArray[Any]:
        ids = self._kind.read(self._ranges, file, start, stop)
        if ids.max() >= self.vocab_size or (ids.dtype.kind == "i" and ids.min() < 0):
            place = int(np.argmax((ids >= self.vocab_size) | (ids < 0)))
            raise ValueError(
                f"{redacted(file.path)}: token {start + place:,} is {ids[place]}, and the tokenizer {self._name!r} has "
                f"{self.vocab_size:,}: the file was made with another tokenizer, or is damaged"
            )
        return ids.astype(self.dtype, copy=False)

    def token_counts(self) -> NDArray[np.int64]:
        """Returns how often each id occurs, (vocab_size,), in at most `COUNTED` ids, evenly spread."""
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for start, stop in counted_windows(len(self)):
            counts += np.bincount(self.read(start, stop), minlength=self.vocab_size)
        return counts


def counted_windows(tokens: int) -> list[tuple[int, int]]:
    """Returns the windows [start, stop) of a sequence in which ids are counted, `WINDOWS` or the whole sequence."""
    size = COUNTED // WINDOWS
    if tokens <= COUNTED:
        return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]
    last = tokens - size
    return [(start, start + size) for start in (last * number // (WINDOWS - 1) for number in range(WINDOWS))]
