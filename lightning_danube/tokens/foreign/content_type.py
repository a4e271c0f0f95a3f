"""Finds the type of ids in a file that does not say it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_danube.tokens.foreign.ranges import ByteRanges
from lightning_danube.tokens.tokenizer import DocumentTokenizer

_WINDOWS, _WINDOW = 16, 1 << 13
_TYPES = ("uint16", "uint32", "int64")


def dtype_of_content(
    ranges: ByteRanges, path: str, stamp: str, start: int, stop: int, tokenizer: DocumentTokenizer
) -> str:
    """Returns the type of the ids in the bytes [start, stop) of a file.

    The type is the narrowest one that has room for the vocabulary, in which all ids of 16 windows belong to the
    vocabulary, and most second ids are not 0. With a type that is too narrow, every second id is the upper half of an
    id, which is 0 if the file is not damaged. With a type that is too wide, an id holds two ids, and is too large.

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
        if tokenizer.vocab_size - 1 > np.iinfo(name).max:
            reasons.append(f"{name} has no room for the vocabulary")
            continue
        if size % dtype.itemsize:
            reasons.append(f"as {name} the last one is incomplete")
            continue
        ids = [np.frombuffer(window, dtype, count=len(window) // dtype.itemsize) for window in windows]
        largest = max((int(part.max()) for part in ids if len(part)), default=0)
        smallest = min((int(part.min()) for part in ids if len(part)), default=0)
        if largest >= tokenizer.vocab_size or smallest < 0:
            reasons.append(f"as {name} there is an id {largest if largest >= tokenizer.vocab_size else smallest:,}")
        elif dtype.itemsize < 8 and size > dtype.itemsize and _are_halves(ids):
            reasons.append(f"as {name} every second id is 0")
        else:
            return name
    raise ValueError(
        f"{path} holds no ids of the tokenizer {tokenizer.name!r} with its {tokenizer.vocab_size:,} tokens "
        f"({', '.join(reasons)}): give data.tokenizer the name of the tokenizer that made it"
    )


def _are_halves(windows: list[NDArray[Any]]) -> bool:
    """Returns whether the second id of most pairs is 0, as in ids that are read as two halves each.

    A pair of zeros says nothing: it may also be padding. A few pairs with another second id are damage.
    """
    pairs = np.concatenate([window[: len(window) // 2 * 2].reshape(-1, 2) for window in windows])
    telling = pairs[pairs.any(axis=1)]
    return bool(2 * np.count_nonzero(telling[:, 1]) <= len(telling))
