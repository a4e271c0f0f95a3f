"""Token ids in files, read as one sequence.

A file is opened when one of its tokens is read for the first time. So a process opens only what it reads, however large
the data are.
"""

from __future__ import annotations

import errno
import os
import sys
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from io import FileIO
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_danube.files import SHORTAGES
from lightning_danube.outside.secrets import redacted

MOST_OPEN = 32
"""Files of a sequence that are open at once. Often a process may open 1,024. Opening one takes microseconds."""
COUNTED_AT_ONCE = 1 << 24
"""Tokens."""


class TokenSegment(NamedTuple):
    """Consecutive token ids in a file.

    Args:
        path: the file, or its address.
        offset: bytes before the first id.
        tokens: number of ids.
    """

    path: Path | str
    offset: int
    tokens: int


class TokenFiles(Protocol):
    """Where the bytes of segments come from."""

    def read(self, path: Path | str, begin: int, end: int) -> NDArray[np.uint8]:
        """Returns the bytes [begin, end) of a file; fewer if the file ends before.

        Raises:
            OSError: the file cannot be read; names it.
        """
        ...


class OpenFiles:
    """Files of this machine. Each is opened when it is first read, and those read last stay open.

    A read asks for exactly its bytes. A memory map would fetch many times as much for a row at a random place: the
    kernel reads ahead around a page that is missing, up to 8 MiB on some disks.
    """

    def __init__(self, most: int = MOST_OPEN) -> None:
        self._most = most
        self._files: OrderedDict[Path | str, FileIO] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # A process that gets a copy opens the files itself.
        return {"_most": self._most, "_files": OrderedDict()}

    def __del__(self) -> None:
        for file in self._files.values():
            file.close()

    def read(self, path: Path | str, begin: int, end: int) -> NDArray[np.uint8]:
        try:
            file = self._files.pop(path, None) or _opened(path)
            self._files[path] = file
            if len(self._files) > self._most:
                self._files.popitem(last=False)[1].close()
            return np.frombuffer(_bytes_at(file, begin, end - begin), dtype=np.uint8)
        except OSError as error:
            number = error.errno or errno.EIO
            advice = " (the file is not the cause: raise ulimit -n, or begin fewer processes)"
            said = os.strerror(number) + (advice if number in SHORTAGES else "")
            raise OSError(number, said, str(path)) from error


def _opened(path: Path | str) -> FileIO:
    return FileIO(path)


def _bytes_at(file: FileIO, begin: int, size: int) -> bytes:
    """Returns bytes of a file from a place on; fewer if the file ends before."""
    parts = []
    while size > 0:
        if sys.platform == "win32":  # which has no pread, and no fork, after which processes would share the place
            file.seek(begin)
            part = file.read(size)
        else:
            part = os.pread(file.fileno(), size, begin)
        if not part:
            break
        parts.append(part)
        begin, size = begin + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class TokenSequence:
    """Tokens of many segments as one sequence. Reading a window reads only its bytes.

    Args:
        segments: in order.
        dtype: of the ids in the files.
        vocab_size: larger ids are refused.
        remedy: what to do about a damaged file, for messages: "delete … and it will be made again".
        files: where the segments are read.
    """

    def __init__(
        self,
        segments: Iterable[TokenSegment],
        dtype: np.dtype[Any],
        vocab_size: int,
        *,
        remedy: str,
        files: TokenFiles | None = None,
    ) -> None:
        self._segments = [segment for segment in segments if segment.tokens]
        self.dtype, self.vocab_size, self._remedy = dtype, vocab_size, remedy
        self._files: TokenFiles = files or OpenFiles()
        self._ends = list(accumulate((segment.tokens for segment in self._segments), initial=0))

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Returns tokens [start, stop).

        Raises:
            ValueError: a file is missing, or ends before its tokens.
            OSError: a file cannot be read.
        """
        assert 0 <= start <= stop <= len(self)
        number = bisect_right(self._ends, start) - 1
        if number < len(self._segments) and stop <= self._ends[number + 1]:
            return self._part(number, start, stop)
        pieces = []
        while start < stop:
            end = min(stop, self._ends[number + 1])
            pieces.append(self._part(number, start, end))
            start, number = end, number + 1
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=self.dtype)

    def _part(self, number: int, start: int, stop: int) -> NDArray[Any]:
        """Returns tokens [start, stop), which lie in one segment."""
        path, offset, _ = self._segments[number]
        size = self.dtype.itemsize
        begin = offset + (start - self._ends[number]) * size
        end = begin + (stop - start) * size
        try:
            content = self._files.read(path, begin, end)
        except FileNotFoundError as error:
            raise ValueError(f"{path} is missing: {self._remedy}") from error
        if len(content) < end - begin:
            raise ValueError(f"{path} ends at byte {begin + len(content):,}, before its tokens: {self._remedy}")
        return content.view(self.dtype)

    def rows(self, context_length: int) -> int:
        """Returns the number of full training rows.

        Each row predicts `context_length` tokens and shares one token with the next row.
        """
        return max(0, len(self) - 1) // context_length

    def row(self, number: int, context_length: int) -> NDArray[Any]:
        """Returns row `number`, (context_length + 1,): inputs and, shifted by one, labels. The last row may be shorter.

        Raises:
            ValueError: an id is outside the vocabulary, so the file is damaged. An embedding must never see such an id.
        """
        start = number * context_length
        row = self.read(start, min(start + context_length + 1, len(self)))
        if len(row) and row.max() >= self.vocab_size:
            self._refuse(start + int(np.argmax(row >= self.vocab_size)))
        return row

    def _refuse(self, position: int) -> NoReturn:
        number = bisect_right(self._ends, position) - 1
        value, path = self.read(position, position + 1)[0], self._segments[number].path
        first = next(at for at, segment in enumerate(self._segments) if segment.path == path)
        raise ValueError(
            f"{redacted(str(path))} is damaged: token {position - self._ends[first]:,} of it is {value}, the "
            f"vocabulary has {self.vocab_size}: {self._remedy}"
        )

    def token_counts(self) -> NDArray[np.int64]:
        """Reads all tokens, and returns how often each id occurs, (vocab_size,).

        Raises:
            ValueError: see `read` and `row`.
        """
        counts = np.zeros(self.vocab_size, dtype=np.int64)
        for begin in range(0, len(self), COUNTED_AT_ONCE):
            part = self.read(begin, min(begin + COUNTED_AT_ONCE, len(self)))
            if part.max() >= self.vocab_size:
                self._refuse(begin + int(np.argmax(part >= self.vocab_size)))
            counts += np.bincount(part, minlength=self.vocab_size)
        return counts
