"""Megatron's indexed data sets (`IndexedDatasetBuilder`), which Megatron-LM, NeMo and datatrove write.

`x.bin` holds the ids side by side. `x.idx` holds, after 34 bytes: for each sequence its length (int32), for each
sequence its first byte (int64), and for each document its first sequence (int64), with one more entry at the end.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_danube.tokens.foreign.layout import INTEGERS, TokenFile, TokenFormat, TokenGroup, with_suffix
from lightning_danube.tokens.foreign.ranges import ByteRanges, FoundFile
from lightning_danube.tokens.tokenizer import DocumentTokenizer

TOKENS, INDEX = ".bin", ".idx"
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16",
}  # fmt: skip


class Megatron(TokenFormat):
    title = "Megatron"

    def find(self, ranges: ByteRanges, path: str) -> list[FoundFile]:
        stem = path.removesuffix(TOKENS).removesuffix(INDEX)
        return [*ranges.find(stem + TOKENS), *ranges.find(stem + INDEX)]

    def groups(self, ranges: ByteRanges, found: Sequence[FoundFile], tokenizer: DocumentTokenizer) -> list[TokenGroup]:
        content = {file.path: file for file in with_suffix(found, TOKENS)}
        indexes = {file.path: file for file in with_suffix(found, INDEX)}
        for index in indexes:
            if (path := index.removesuffix(INDEX) + TOKENS) not in content:
                raise ValueError(f"{path} is missing, to which {index} belongs: copy it beside its index")
        return [self._group(ranges, file, indexes) for file in content.values()]

    def _group(self, ranges: ByteRanges, file: FoundFile, indexes: dict[str, FoundFile]) -> TokenGroup:
        path = file.path.removesuffix(TOKENS) + INDEX
        index = indexes.get(path)
        if index is None:
            raise ValueError(f"{path} is missing, which lists the ends of documents: copy it beside {file.path}")
        if not file.bytes:
            raise ValueError(f"{file.path} is empty: remove it and its index, or make both again")
        magic, version, code, sequences, entries = (b"", 0, 0, 0, 0)
        if index.bytes >= _HEADER.size:
            magic, version, code, sequences, entries = _HEADER.unpack(ranges.read(path, 0, _HEADER.size, index.stamp))
        if magic != _MAGIC or version != 1:
            raise ValueError(f"{path} is not an index of Megatron (version 1), or was cut off: copy it again")
        dtype = _TYPES.get(code, f"the unknown type {code}")
        if dtype not in INTEGERS:
            raise ValueError(f"{path} says that the ids are {dtype}: only whole numbers are read")
        expected = _HEADER.size + 12 * sequences + 8 * entries
        if index.bytes == expected + sequences:
            raise ValueError(f"{path} lists modes of sequences: data of several modes are not read")
        if index.bytes != expected or entries < 2:
            raise ValueError(
                f"{path} has {index.bytes:,} bytes instead of {expected:,} for {sequences:,} sequences and "
                f"{max(0, entries - 1):,} documents: it was cut off; copy it again"
            )
        size = np.dtype(dtype).itemsize
        last = _pointers(ranges, index, sequences, sequences - 1, sequences)[0] // size
        (length,) = np.frombuffer(
            ranges.read(path, *_places(_HEADER.size, 4, sequences - 1, sequences), index.stamp), "<i4"
        )
        tokens = int(last + length)
        if tokens * size != file.bytes:
            raise ValueError(
                f"{file.path} has {file.bytes:,} bytes, and its index lists {tokens:,} tokens of {size} bytes each: "
                "the file or its index was cut off; copy both again"
            )
        described = TokenFile(file.path, f"{file.stamp} {index.stamp}", dtype, tokens)
        group = TokenGroup((described,), entries - 1)
        if int(self.document_ends(ranges, group, entries - 2, entries - 1)[0]) != tokens:
            raise ValueError(f"{path} is damaged: its last document does not end with its last sequence; copy it again")
        return group

    def document_ends(self, ranges: ByteRanges, group: TokenGroup, first: int, stop: int) -> NDArray[np.int64]:
        (file,) = group.files
        index = FoundFile(file.path.removesuffix(TOKENS) + INDEX, 0, file.stamp)
        *_, sequences, _entries = _HEADER.unpack(ranges.read(index.path, 0, _HEADER.size, index.stamp))
        begin = _HEADER.size + 12 * sequences
        # Entry n is the first sequence of document n, and so the end of document n − 1.
        entries = np.frombuffer(ranges.read(index.path, *_places(begin, 8, first + 1, stop + 1), index.stamp), "<i8")
        if (np.diff(entries) < 0).any() or not 0 <= entries[0] <= entries[-1] <= sequences:
            raise ValueError(f"{index.path} is damaged: its documents are not in order; copy it again")
        low, high = int(entries[0]), int(entries[-1])
        pointers = _pointers(ranges, index, sequences, low, min(high + 1, sequences))
        ends = pointers // np.dtype(file.dtype).itemsize
        if high == sequences:
            ends = np.append(ends, file.tokens)
        return ends[entries - low]


def _places(begin: int, size: int, first: int, stop: int) -> tuple[int, int]:
    return begin + size * first, begin + size * stop


def _pointers(ranges: ByteRanges, index: FoundFile, sequences: int, first: int, stop: int) -> NDArray[np.int64]:
    """Returns the first byte of the sequences [first, stop)."""
    begin, end = _places(_HEADER.size + 4 * sequences, 8, first, stop)
    return np.frombuffer(ranges.read(index.path, begin, end, index.stamp), "<i8").astype(np.int64)
