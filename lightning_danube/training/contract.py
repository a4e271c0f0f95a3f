"""What a task and its data agree on."""

from __future__ import annotations

IGNORE_INDEX = -100
"""The label of a token that the loss does not count."""
