"""Loggers of a run: where they write, how they count, and that none of them can stop a run."""

from __future__ import annotations

import re

TOKENS, STEPS = "tokens", "optimizer/step"
"""Names of the values that a logger adds: the training tokens, and in TensorBoard the optimizer steps."""


def text_tag(group: str, number: int, text: str) -> str:
    """Returns the tag of a text in TensorBoard: its number, and how the prompt or the question begins."""
    words = re.sub(r"[^\w.-]+", "_", text)[:40].strip("_")
    return f"{group}/{number}_{words}" if words else f"{group}/{number}"
