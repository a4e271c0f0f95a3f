"""Finds the type of ids in a file that does not say it."""

from __future__ import annotations

import numpy as np

from lightning_danube.tokens.foreign.ranges import ByteRanges
from lightning_danube.tokens.tokenizer import DocumentTokenizer

_WINDOWS, _WINDOW = 16, 1 << 13
_TYPES = ("uint16", "uint32", "int64")


def dtype_of_content(
    ranges: ByteRanges, path: str, stamp: str, start: int, stop: int, tokenizer: DocumentTokenizer
) -> str:
    """Returns the type of the ids in the bytes [start, stop) of a file.

    The type is the narrowest one in which all ids of 16 windows belong to the vocabulary, and not every second id is 0.
    With a type that is too narrow, every second id is the upper half of an id, which is 0. With a type that is too
    wide, an id holds two ids, and is too large.

    Raises:
        ValueError: no type fits.
    """
    size = stop - start
    windows = []
    for number in range(_WINDOWS):
        begin = start + max(0, size - _WINDOW) * number // (_WINDOWS - 1) // 8 * 8
        windows.append(bytes(ranges.read(path, begin, min(begin + _WINDOW, stop), stamp)))
    reasons = []
    for name in _TYPES:
        dtype = np.dtype(name).newbyteorder("<")
        if size % dtype.itemsize:
            reasons.append(f"as {name} the last one is incomplete")
            continue
        ids = [np.frombuffer(window, dtype, count=len(window) // dtype.itemsize) for window in windows]
        largest = max((int(part.max()) for part in ids if len(part)), default=0)
        smallest = min((int(part.min()) for part in ids if len(part)), default=0)
        if largest >= tokenizer.vocab_size or smallest < 0:
            reasons.append(f"as {name} there is an id {largest if largest >= tokenizer.vocab_size else smallest:,}")
        elif dtype.itemsize < 8 and all(not part[1::2].any() for part in ids) and size > dtype.itemsize:
            reasons.append(f"as {name} every second id is 0")
        else:
            return name
    raise ValueError(
        f"{path} holds no ids of the tokenizer {tokenizer.name!r} with its {tokenizer.vocab_size:,} tokens "
        f"({', '.join(reasons)}): give data.tokenizer the name of the tokenizer that made it"
    )
