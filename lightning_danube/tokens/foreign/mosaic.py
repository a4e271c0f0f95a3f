"""MosaicML's MDS files (`MDSWriter` of mosaicml-streaming), as LLM Foundry writes them for pre-training.

`index.json` lists the shards of one stream. A shard holds the number of its samples (uint32), the first byte of each
sample and the end of the last one (uint32 each), a description, and the samples. A sample holds the sizes of the
columns whose size varies (uint32 each), and then its columns. Documents may continue in the next sample and shard.

The reader of mosaicml-streaming reads whole shards, and cannot be installed beside transformers 5. Rows are read in
random order here, so this reader takes only the bytes of a row.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_danube.files import parse_json
from lightning_danube.outside.names import plain_name
from lightning_danube.tokens.foreign.content_type import dtype_of_content
from lightning_danube.tokens.foreign.layout import INTEGERS, TokenFile, TokenFormat, TokenGroup, with_suffix
from lightning_danube.tokens.foreign.ranges import ByteRanges, FoundFile
from lightning_danube.tokens.tokenizer import DocumentTokenizer

INDEX, SUFFIX = "index.json", ".mds"
COLUMNS = ("tokens", "input_ids")
"""Columns that may hold the ids. The first one that is there is read."""
_MOST_TABLES = 64
_IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class _Column:
    """Where the ids are in a sample.

    Args:
        dtype: type of the ids; None if the listing does not say it.
        before, after: bytes of a sample before and after the column of the ids.
        shaped: whether the length of the array comes before the ids.
    """

    dtype: str | None
    before: int
    after: int
    shaped: bool


class Mosaic(TokenFormat):
    title = "MosaicML"

    def __init__(self) -> None:
        self._tables: OrderedDict[str, tuple[_IntArray, _IntArray]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_tables": OrderedDict()}

    def find(self, ranges: ByteRanges, path: str) -> list[FoundFile]:
        folder = os.path.dirname(path) if path.endswith(INDEX) else path.rstrip("/")
        return [*ranges.find(os.path.join(folder, INDEX)), *ranges.find(os.path.join(folder, f"*{SUFFIX}"))]

    def groups(self, ranges: ByteRanges, found: Sequence[FoundFile], tokenizer: DocumentTokenizer) -> list[TokenGroup]:
        shards = {file.path: file for file in with_suffix(found, SUFFIX)}
        if not with_suffix(found, INDEX):
            folder = os.path.dirname(found[0].path)
            raise ValueError(
                f"{os.path.join(folder, INDEX)}, which lists the shards, is not a file: copy it there again"
            )
        return [self._group(ranges, index, shards, tokenizer) for index in with_suffix(found, INDEX)]

    def _group(
        self, ranges: ByteRanges, index: FoundFile, shards: dict[str, FoundFile], tokenizer: DocumentTokenizer
    ) -> TokenGroup:
        listing = parse_json(bytes(ranges.read(index.path, 0, index.bytes, index.stamp)), index.path)
        try:
            listed = [
                (_shard_file(index.path, shard, shards), _column(index.path, shard), int(shard["samples"]))
                for shard in listing["shards"]
            ]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{index.path} is not a listing of MDS shards, or is damaged ({error}): copy it again"
            ) from error
        if not listed:
            raise ValueError(f"{index.path} lists no shards: remove it, or make it again")
        files = tuple(_described(ranges, *shard, tokenizer) for shard in listed)
        for file in files:
            if file.dtype != files[0].dtype:
                raise ValueError(
                    f"{file.path} holds {file.dtype}, and {files[0].path} {files[0].dtype}: the shards of a stream "
                    "have one type, so one of the two is damaged; copy both again"
                )
        return TokenGroup(files)

    def read(self, ranges: ByteRanges, file: TokenFile, start: int, stop: int) -> NDArray[Any]:
        dtype = np.dtype(file.dtype).newbyteorder("<")
        if start == stop:
            return np.empty(0, dtype)
        bytes_S, tokens_S = self._samples(ranges, file, start, stop)
        # The last sample begins at or before the last id.
        end = int(bytes_S[-1] + (stop - tokens_S[-1]) * dtype.itemsize)
        begin = int(bytes_S[0] + (start - tokens_S[0]) * dtype.itemsize)
        content = ranges.read(file.path, begin, end, file.stamp)
        pieces = []
        for number, (place, first) in enumerate(zip(bytes_S.tolist(), tokens_S.tolist(), strict=True)):
            behind = int(tokens_S[number + 1]) if number + 1 < len(tokens_S) else stop
            low = max(start, first)
            pieces.append(
                np.frombuffer(content, dtype, behind - low, offset=place + (low - first) * dtype.itemsize - begin)
            )
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _samples(self, ranges: ByteRanges, file: TokenFile, start: int, stop: int) -> tuple[_IntArray, _IntArray]:
        """Returns for each sample that holds ids of [start, stop) the byte and the number of its first id."""
        if len(file.samples) == 2:
            tokens, size = file.samples
            numbers = np.arange(start // tokens, (stop - 1) // tokens + 1)
            return file.start + numbers * size, numbers * tokens
        if file.path not in self._tables:
            before, after, shaped = file.samples
            column = _Column(file.dtype, before, after, bool(shaped))
            offsets = _offsets(ranges, file.path, file.stamp)
            headers, counts = _ids_of_samples(np.diff(offsets), column, np.dtype(file.dtype).itemsize, file.path)
            self._tables[file.path] = offsets[:-1] + before + headers, np.cumsum(counts) - counts
            if len(self._tables) > _MOST_TABLES:
                self._tables.popitem(last=False)
        bytes_S, tokens_S = self._tables[file.path]
        low = int(np.searchsorted(tokens_S, start, side="right")) - 1
        high = int(np.searchsorted(tokens_S, stop, side="left"))
        return bytes_S[low:high], tokens_S[low:high]


def _shard_file(index: str, shard: dict[str, Any], shards: dict[str, FoundFile]) -> FoundFile:
    name = plain_name(shard["raw_data"]["basename"], "the name of a file")
    path = os.path.join(os.path.dirname(index), name)
    if shard["format"] != "mds" or shard["version"] != 2:
        raise ValueError(
            f"{index} lists {name} with the format {shard['format']!r}, version {shard['version']}: mds, version 2 is "
            "read"
        )
    file = shards.get(path)
    if file is None and shard["compression"]:
        raise ValueError(
            f"{path} is compressed ({shard['compression']}), and a row cannot be read from the middle of it: write the "
            "stream without compression"
        )
    if file is None:
        raise ValueError(f"{path} is missing, which {index} lists: copy it there")
    if file.bytes != (expected := int(shard["raw_data"]["bytes"])):
        raise ValueError(f"{path} has {file.bytes:,} bytes instead of {expected:,}: it was cut off; copy it again")
    return file


def _column(index: str, shard: dict[str, Any]) -> _Column:
    """Returns where the ids are in the samples of a shard.

    Raises:
        ValueError: no column holds ids, or several columns have a size that varies.
    """
    names, sizes = list(shard["column_names"]), list(shard["column_sizes"])
    own = next((names.index(name) for name in COLUMNS if name in names), None)
    where = f"{index}: {shard['raw_data']['basename']} with the columns {', '.join(map(str, names))}"
    if own is None:
        raise ValueError(f"{where}: none of them is {' or '.join(COLUMNS)}")
    if [name for number, name in enumerate(names) if number != own and sizes[number] is None]:
        raise ValueError(f"{where}: only the column {names[own]} may have a size that varies")
    kind, _, details = str(shard["column_encodings"][own]).partition(":")
    dtype, _, shape = details.partition(":")
    if kind not in ("bytes", "ndarray") or (kind == "ndarray" and dtype not in INTEGERS):
        raise ValueError(
            f"{where}: {names[own]} is {shard['column_encodings'][own]!r}: bytes, and ndarray with a type of whole "
            "numbers are read"
        )
    head = 4 * (sizes[own] is None)
    return _Column(
        dtype or None,
        head + sum(size for size in sizes[:own]),
        sum(size for size in sizes[own + 1 :]),
        kind == "ndarray" and not shape,
    )


def _described(
    ranges: ByteRanges, file: FoundFile, column: _Column, samples: int, tokenizer: DocumentTokenizer
) -> TokenFile:
    offsets = _offsets(ranges, file.path, file.stamp)
    sizes = np.diff(offsets)
    if len(sizes) != samples or not samples or offsets[-1] != file.bytes:
        raise ValueError(
            f"{file.path} is empty or damaged: its samples are not those that {INDEX} lists; copy it again"
        )
    dtype = column.dtype or dtype_of_content(
        ranges, file.path, file.stamp, int(offsets[0]) + column.before, int(offsets[1]) - column.after, tokenizer
    )
    if column.shaped:
        place = int(offsets[0]) + column.before
        if (axes := ranges.read(file.path, place, place + 1, file.stamp)[0] >> 2) != 1:
            raise ValueError(f"{file.path}: a sample is an array of {axes} axes, and one axis is read")
    headers, counts = _ids_of_samples(sizes, column, np.dtype(dtype).itemsize, file.path)
    described = TokenFile(file.path, file.stamp, dtype, int(counts.sum()))
    if (sizes == sizes[0]).all():
        start = int(offsets[0]) + column.before + int(headers[0])
        return TokenFile(**vars(described) | {"start": start, "samples": (int(counts[0]), int(sizes[0]))})
    return TokenFile(**vars(described) | {"samples": (column.before, column.after, int(column.shaped))})


def _offsets(ranges: ByteRanges, path: str, stamp: str) -> _IntArray:
    """Returns the first byte of each sample of a shard, and the end of the last one."""
    (samples,) = np.frombuffer(ranges.read(path, 0, 4, stamp), "<u4").tolist()
    return np.frombuffer(ranges.read(path, 4, 4 * (samples + 2), stamp), "<u4").astype(np.int64)


def _ids_of_samples(sizes: _IntArray, column: _Column, itemsize: int, path: str) -> tuple[_IntArray, _IntArray]:
    """Returns for samples of these sizes the bytes of an array's length, which come before the ids, and the ids.

    The length has 1, 2 or 4 bytes, and a byte that says so.
    """
    room = sizes - column.before - column.after
    headers = np.zeros_like(room)
    if column.shaped:
        counts = [(room - header) // itemsize for header in (2, 3, 5)]
        headers = np.where(counts[0] < 1 << 8, 2, np.where(counts[1] < 1 << 16, 3, 5))
    ids, rest = np.divmod(room - headers, itemsize)
    if rest.any() or (ids <= 0).any():
        raise ValueError(f"{path} is damaged: a sample is not an array of ids; copy it again")
    return headers, ids
