"""Reads options as users write them: tokens, shares of a run, names of precisions, mappings in place of dataclasses."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from fractions import Fraction
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

Length = int | float | str
"""A part of a run as users write it: 1048576, "2.8T" tokens, or "5 %" of the run. See `TokensOrShare`."""

MOST_TOKENS = 10**15
"""A hundred times the longest runs. Sums of much larger numbers do not fit into the 64 bits of an index."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


class TooManyTokens(ValueError):
    """A number of tokens is above `MOST_TOKENS`."""


def parse_tokens(value: int | float | str, what: str = "tokens") -> int:
    """Returns the number of tokens from 1048576, 1e6, "700K", "2.36B" or "2.8T".

    Raises:
        ValueError: not a positive whole number of tokens.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?(?:e[0-9]+)?)\s*([KMBT]?)", str(value).replace("_", ""), re.IGNORECASE)
    tokens = float(match[1]) * _UNITS[match[2].upper()] if match else math.nan
    if not match or not tokens >= 1 or not math.isfinite(tokens):
        raise ValueError(f"{what} is {value!r}: give a positive number of tokens such as 1048576, 700K, 1.15T")
    if tokens > MOST_TOKENS:
        raise TooManyTokens(f"{what} is {value!r}, more than {MOST_TOKENS // 10**12:,}T: count again")
    return round(tokens)


def check_processes(number: int, key: str, *, least: int = 0) -> None:
    """Checks a number of processes, which would otherwise be started one after the other until the memory is full.

    Args:
        key: name of the option in messages.

    Raises:
        ValueError: the number is below `least`, or far above the cores of this machine.
    """
    cores = os.cpu_count() or 1
    most = max(64, 4 * cores)
    if not least <= number <= most:
        raise ValueError(f"{key} is {number}: give {least} to {most}, as this machine has {cores} cores")


@dataclass(frozen=True)
class TokensOrShare:
    """A part of a run: a number of tokens, or a share of the tokens of the whole run.

    Args:
        amount: tokens, or the share from 0 to 1.
        is_share: whether `amount` is a share.
    """

    amount: Fraction
    is_share: bool

    @classmethod
    def parse(cls, value: Length, what: str, *, zero: bool = False) -> TokensOrShare:
        """Reads 1048576, "700K" or "2.8T" as tokens, "5 %" or "5%" as a share.

        Args:
            what: name of the option in messages.
            zero: whether 0 is allowed.

        Raises:
            ValueError: it is neither, a share is above 100 %, or it is 0 and must not be.
        """
        written = str(value).replace("_", "").strip()
        share = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%", written)
        if share:
            part = cls(Fraction(share[1]) / 100, is_share=True)
            if part.amount > 1:
                raise ValueError(f"{what} is {value!r}, more than the whole run: give at most '100 %'")
        elif zero and written in ("0", "0.0"):
            part = cls(Fraction(0), is_share=False)
        else:
            try:
                part = cls(Fraction(parse_tokens(value, what)), is_share=False)
            except TooManyTokens:
                raise
            except ValueError:
                raise ValueError(
                    f"{what} is {value!r}: give tokens such as 1048576, 700K, 1.15T, or a share of the run such as "
                    f"'{_meant_share(value)}'"
                ) from None
        if not part.amount and not zero:
            raise ValueError(f"{what} is {value!r}: give a share above 0, such as '5 %'")
        return part

    def of(self, total_tokens: int) -> int:
        """Returns the number of tokens in a run of `total_tokens`."""
        return round(self.amount * total_tokens) if self.is_share else int(self.amount)

    def steps(self, total_tokens: int, batch_tokens: int) -> int:
        """Returns the number of optimizer steps of `batch_tokens`, rounded up, at least 1."""
        return max(1, -(-self.of(total_tokens) // batch_tokens))


def written_share(share: float | Fraction) -> str:
    """Returns a share as users write it: "5 %"."""
    return f"{100 * float(share):.6g} %"


def _meant_share(value: object) -> str:
    """Returns the share that a user means by a number: some write 0.05 for "5 %"."""
    try:
        share = float(str(value))
    except ValueError:
        share = 0.0
    return written_share(share if 0 < share < 1 else 0.05)


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
