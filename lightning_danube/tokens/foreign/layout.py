"""What the reader of a format says of its files, and what a reader has to offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_danube.tokens.foreign.ranges import ByteRanges, FoundFile
from lightning_danube.tokens.tokenizer import DocumentTokenizer

INTEGERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
"""Types of ids that are read."""


@dataclass(frozen=True)
class TokenFile:
    """A file of token ids.

    Args:
        path: path or address.
        stamp: see `FoundFile`.
        dtype: type of the ids in the file.
        tokens: number of ids.
        start: bytes before the first id.
        samples: for files whose ids are not side by side: what the format needs to find them.
    """

    path: str
    stamp: str
    dtype: str
    tokens: int
    start: int = 0
    samples: tuple[int, ...] = ()


@dataclass(frozen=True)
class TokenGroup:
    """Files that hold whole documents, which may continue from one file to the next.

    Args:
        files: in order.
        documents: number of documents; None if the format lists no ends of documents.
        tokenizer: name of the tokenizer, if the format names one.
        cut: the tokens before this one are for training, the others are held out.
        held_out_documents: number of documents that are held out.
    """

    files: tuple[TokenFile, ...]
    documents: int | None = None
    tokenizer: str | None = None
    cut: int = 0
    held_out_documents: int = 0

    @property
    def tokens(self) -> int:
        return sum(file.tokens for file in self.files)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> TokenGroup:
        files = (TokenFile(**{**file, "samples": tuple(file["samples"])}) for file in values["files"])
        return cls(**{**values, "files": tuple(files)})


class TokenFormat:
    """A format of token files whose ids are side by side.

    A subclass finds and describes the files. If the format lists the ends of documents, the subclass returns them.
    """

    title = ""
    """Name of the tool that writes the format."""

    def find(self, ranges: ByteRanges, path: str) -> list[FoundFile]:
        """Returns all files that a source's path names, with the files beside them that belong to the format."""
        raise NotImplementedError

    def groups(self, ranges: ByteRanges, found: Sequence[FoundFile], tokenizer: DocumentTokenizer) -> list[TokenGroup]:
        """Returns the groups of the files that `find` returned, whose sizes and types were checked.

        Raises:
            ValueError: a file is empty, damaged, or of another format; or a file that belongs to it is missing.
        """
        raise NotImplementedError

    def document_ends(self, ranges: ByteRanges, group: TokenGroup, first: int, stop: int) -> NDArray[np.int64]:
        """Returns for the documents [first, stop) the number of tokens of the group up to their end."""
        raise NotImplementedError

    def read(self, ranges: ByteRanges, file: TokenFile, start: int, stop: int) -> NDArray[Any]:
        """Returns the ids [start, stop) of a file, in the file's type.

        Raises:
            ValueError: the file cannot be read.
        """
        dtype = np.dtype(file.dtype).newbyteorder("<")
        begin, end = (file.start + place * dtype.itemsize for place in (start, stop))
        return np.frombuffer(ranges.read(file.path, begin, end, file.stamp), dtype=dtype)


def with_suffix(found: Sequence[FoundFile], suffix: str) -> list[FoundFile]:
    return [file for file in found if file.path.endswith(suffix)]
