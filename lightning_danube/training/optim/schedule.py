"""Learning-rate schedules, stated in tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from lightning_danube.options import parse_tokens


@dataclass(frozen=True)
class LearningRate:
    """Learning rate as a function of the tokens seen.

    Args:
        peak: rate after the warm-up.
        final: rate at the end of the run.
        warmup: tokens of the linear rise from 0 ("2.36B").
        shape: "cosine" and "linear" fall from the peak to the end. "wsd" (warm-up, stable, decay; Hu et al. 2024, arXiv
            2404.06395) stays at the peak and falls linearly over the last `decay` tokens.
        decay: tokens of the final fall, for "wsd" only.

    Raises:
        ValueError: a value is out of range, or `decay` does not fit the shape.
    """

    peak: float
    final: float
    warmup: int | str
    shape: Literal["cosine", "linear", "wsd"] = "cosine"
    decay: int | str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.final <= self.peak or not math.isfinite(self.peak) or self.peak == 0:
            raise ValueError(
                f"learning rate falls from peak {self.peak} to final {self.final}: 0 <= final <= peak is needed"
            )
        warmup = 0 if self.warmup in (0, "0") else parse_tokens(self.warmup, "warmup")
        object.__setattr__(self, "warmup", warmup)
        if (self.shape == "wsd") != (self.decay is not None):
            raise ValueError(f"decay is {self.decay} with shape {self.shape!r}: it belongs to 'wsd', which needs it")
        if self.decay is not None:
            object.__setattr__(self, "decay", parse_tokens(self.decay, "decay"))

    def check(self, total_tokens: int) -> None:
        """Checks that warm-up and decay fit into the run.

        Raises:
            ValueError: they need more tokens than the run has.
        """
        needed = int(self.warmup) + int(self.decay or 0)
        if needed > total_tokens:
            raise ValueError(
                f"warm-up ({int(self.warmup):,}) and decay ({int(self.decay or 0):,}) take {needed:,} tokens, the run "
                f"has {total_tokens:,}: shorten them"
            )

    def at(self, tokens: float, total_tokens: int) -> float:
        """Returns the rate of the optimizer step that *ends* after `tokens` tokens."""
        warmup = int(self.warmup)
        if tokens < warmup:
            return self.peak * tokens / warmup
        if self.shape != "wsd":
            progress = min(1.0, (tokens - warmup) / max(1, total_tokens - warmup))
            left = 1 - progress if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
            return self.final + (self.peak - self.final) * left
        decay = int(self.decay or 0)
        left = max(0.0, (total_tokens - tokens) / decay)
        return self.peak if left >= 1 else self.final + (self.peak - self.final) * left
