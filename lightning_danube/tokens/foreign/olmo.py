"""OLMo's and Dolma's arrays (`dolma tokens`, `MemmapWriter`): ids side by side in `x.npy`, without a header.

The file does not say its type, which OLMo's configuration gives. It is found by the content. A file that `numpy.save`
wrote has a header, which says the type. Documents end with the end token, and none continues in another file.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from lightning_danube.tokens.foreign.content_type import dtype_of_content
from lightning_danube.tokens.foreign.layout import INTEGERS, TokenFile, TokenFormat, TokenGroup
from lightning_danube.tokens.foreign.ranges import ByteRanges, FoundFile
from lightning_danube.tokens.hub import first_line
from lightning_danube.tokens.tokenizer import DocumentTokenizer

SUFFIX = ".npy"
_MAGIC = b"\x93NUMPY"
_MOST_HEADER = 1 << 12


class Olmo(TokenFormat):
    title = "OLMo"

    def find(self, ranges: ByteRanges, path: str) -> list[FoundFile]:
        return ranges.find(path)

    def groups(self, ranges: ByteRanges, found: Sequence[FoundFile], tokenizer: DocumentTokenizer) -> list[TokenGroup]:
        return [TokenGroup((self._file(ranges, file, tokenizer),)) for file in found]

    def _file(self, ranges: ByteRanges, file: FoundFile, tokenizer: DocumentTokenizer) -> TokenFile:
        if not file.bytes:
            raise ValueError(f"{file.path} is empty: remove it, or make it again")
        head = bytes(ranges.read(file.path, 0, min(file.bytes, _MOST_HEADER), file.stamp))
        if head.startswith(_MAGIC):
            return _with_header(file, head)
        if file.bytes % 2:
            raise ValueError(f"{file.path} has {file.bytes:,} bytes, no multiple of 2: it was cut off; copy it again")
        dtype = dtype_of_content(ranges, file.path, file.stamp, 0, file.bytes, tokenizer)
        return TokenFile(file.path, file.stamp, dtype, file.bytes // np.dtype(dtype).itemsize)


def _with_header(file: FoundFile, head: bytes) -> TokenFile:
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except Exception as error:  # numpy reads the header by Python's own parser, which raises errors of many kinds
        raise ValueError(f"{file.path} has a damaged header of numpy ({first_line(error)}): save it again") from error
    if dtype.name not in INTEGERS or dtype.byteorder == ">" or len(shape) != 1:
        raise ValueError(
            f"{file.path} holds {dtype} of shape {shape}: one row of whole numbers, low byte first, is read"
        )
    start = stream.tell()
    if file.bytes != start + shape[0] * dtype.itemsize:
        raise ValueError(
            f"{file.path} has {file.bytes:,} bytes, and its header lists {shape[0]:,} ids of {dtype.itemsize} bytes: "
            "it was cut off; copy it again"
        )
    if not shape[0]:
        raise ValueError(f"{file.path} is empty: remove it, or make it again")
    return TokenFile(file.path, file.stamp, dtype.name, shape[0], start)
