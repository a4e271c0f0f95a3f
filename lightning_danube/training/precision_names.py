"""Lightning's names of precisions."""

from __future__ import annotations

PRECISIONS = (
    *("32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"),
    *("64-true", "32", "16", "bf16", "64", "transformer-engine", "transformer-engine-float16", "null"),
)
"""All names, the usual ones first."""

FULL_NAMES = {"64": "64-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""Short name → full name."""


def full_name(precision: object) -> str:
    """Returns the full name of a precision: "bf16" is "bf16-mixed"."""
    return FULL_NAMES.get(str(precision), str(precision))
