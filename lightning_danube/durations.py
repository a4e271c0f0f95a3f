"""Durations are stated in tokens, as people write them."""

from __future__ import annotations

import math
import re

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_tokens(value: int | float | str, what: str = "tokens") -> int:
    """Number of tokens from 1048576, 1e6, "700K", "2.36B" or "2.8T".

    Raises:
        ValueError: not a positive whole number of tokens.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([KMBT]?)", str(value).replace("_", ""), re.IGNORECASE)
    tokens = float(match[1]) * _UNITS[match[2].upper()] if match else math.nan
    if not match or not tokens >= 1 or not math.isfinite(tokens):
        raise ValueError(f"{what} is {value!r}: give a positive number of tokens such as 1048576, 700K, 1.15T")
    return round(tokens)
