"""Reads options as users write them: numbers of tokens, names of precisions, mappings in place of dataclasses."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, ClassVar, Protocol, TypeVar

from lightning_danube.terminal import name_meant


class DataclassInstance(Protocol):
    """Any dataclass, for the type checker."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


Options = TypeVar("Options", bound="DataclassInstance")
PRECISIONS = (
    *("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"),
    *("64-true", "32", "16", "bf16", "64", "transformer-engine", "transformer-engine-float16", "null"),
)
"""Lightning's names of precisions, the usual ones first."""

FULL_NAMES = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Short name → full name."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_tokens(value: int | float | str, what: str = "tokens") -> int:
    """Returns the number of tokens from 1048576, 1e6, "700K", "2.36B" or "2.8T".

    Raises:
        ValueError: not a positive whole number of tokens.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([KMBT]?)", str(value).replace("_", ""), re.IGNORECASE)
    tokens = float(match[1]) * _UNITS[match[2].upper()] if match else math.nan
    if not match or not tokens >= 1 or not math.isfinite(tokens):
        raise ValueError(f"{what} is {value!r}: give a positive number of tokens such as 1048576, 700K, 1.15T")
    return round(tokens)


def options(kind: type[Options], given: Options | Mapping[str, Any] | str, key: str) -> Options:
    """Returns options as a dataclass. In Python, a mapping or the first field alone may replace the dataclass.

    Args:
        kind: the dataclass.
        key: name of the options in messages.

    Raises:
        ValueError: an option is missing or unknown.
    """
    if isinstance(given, kind):
        return given
    known = [field.name for field in fields(kind) if field.init]
    if isinstance(given, str):
        return kind(**{known[0]: given})
    if not isinstance(given, Mapping):
        raise ValueError(f"{key} is {given!r}: give a mapping with the options {', '.join(known)}")
    if unknown := [str(name) for name in given if name not in known]:
        hint = name_meant(unknown[0], known, "the options are")
        raise ValueError(f"{key} has the option {unknown[0]!r}: {hint}")
    needed = [
        field.name
        for field in fields(kind)
        if field.init and field.default is MISSING and field.default_factory is MISSING
    ]
    if missing := [name for name in needed if name not in given]:
        raise ValueError(f"{key} has no {missing[0]}: the options are {', '.join(known)}")
    return kind(**given)


def full_name(precision: object) -> str:
    """Returns the full name of a precision: "bf16" is "bf16-mixed"."""
    return FULL_NAMES.get(str(precision), str(precision))
