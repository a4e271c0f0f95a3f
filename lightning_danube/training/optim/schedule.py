"""Learning-rate schedules, stated in tokens or in shares of the run."""

from __future__ import annotations

import math
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from lightning_danube.options import Length, TokensOrShare

Fall = Callable[[float], float]
"""The part of the run after the warm-up that is done, from 0 to 1 → the share of the way from `final` to `peak` that is
left."""

FALLS: dict[str, Fall] = {
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
}


@dataclass(frozen=True)
class LearningRate:
    """Learning rate as a function of the tokens seen.

    Args:
        peak: rate after the warm-up.
        final: rate at the end of the run.
        warmup: length of the linear rise from 0, in tokens ("2.36B") or as a share of the run ("5 %"); 0 for none.
        shape: "cosine" and "linear" fall from the peak to the end. "wsd" (warm-up, stable, decay; Hu et al. 2024, arXiv
            2404.06395) stays at the peak and falls linearly over the last part, `decay`. "module.function" is a fall of
            your own, see `Fall`.
        decay: length of the final fall, in tokens or as a share of the run, for "wsd" only. 0: the rate stays at the
            peak, in a run from which decays begin.

    Raises:
        ValueError: a value is out of range, or `decay` does not fit the shape.
    """

    peak: float
    final: float
    warmup: Length
    shape: str = "cosine"
    decay: Length | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.final <= self.peak or not math.isfinite(self.peak) or self.peak == 0:
            raise ValueError(
                f"learning rate falls from peak {self.peak} to final {self.final}: 0 <= final <= peak is needed"
            )
        if self.shape == "wsd" and self.decay is None:
            raise ValueError("decay is not given, and shape 'wsd' needs it: give its length, such as '20 %', or 0")
        if self.shape != "wsd" and self.decay is not None:
            raise ValueError(
                f"decay is {self.decay!r} with shape {self.shape!r}, which falls from the warm-up to the end: leave it "
                "out, or set shape to wsd"
            )
        if self.shape != "wsd":
            _ = self._fall
        shares = sum(part.amount for part in (self._warmup, self._decay) if part.is_share)
        if shares > 1:
            raise ValueError(
                f"warmup {self.warmup} and decay {self.decay} are more than the whole run: together at most 100 %"
            )

    @cached_property
    def _warmup(self) -> TokensOrShare:
        return TokensOrShare.parse(self.warmup, "warmup", zero=True)

    @cached_property
    def _decay(self) -> TokensOrShare:
        return TokensOrShare.parse(self.decay or 0, "decay", zero=True)

    @cached_property
    def _fall(self) -> Fall:
        if self.shape in FALLS:
            return FALLS[self.shape]
        problem = f"shape is {self.shape!r}"
        if "." in self.shape:
            try:
                fall = pkgutil.resolve_name(self.shape)
            except (ImportError, AttributeError, ValueError) as error:
                raise ValueError(f"{problem}, which cannot be imported ({error})") from error
            if callable(fall):
                return fall
            problem += ", which is not a function"
        raise ValueError(
            f"{problem}: choose {', '.join(FALLS)} or wsd, or name your own function as module.function, from the "
            "part of the run after the warm-up that is done (0 to 1) to the share of the peak rate that is left"
        )

    def parts(self, total_tokens: int) -> tuple[int, int]:
        """Returns the tokens of the warm-up and of the decay in a run of `total_tokens`."""
        return self._warmup.of(total_tokens), self._decay.of(total_tokens)

    def check(self, total_tokens: int, *, is_limit: bool = False) -> None:
        """Checks that warm-up and decay fit into the run.

        Args:
            is_limit: whether the run has at most `total_tokens`, and its length is not known yet.

        Raises:
            ValueError: they need more tokens than the run has.
        """
        warmup, decay = self.parts(total_tokens)
        most = "at most " if is_limit else ""
        if warmup > total_tokens:
            raise ValueError(
                f"model.learning_rate.warmup is {self.warmup}, and the whole run has {most}{total_tokens:,} tokens: "
                f"give a share of the run, such as '5 %', or at most {total_tokens}"
            )
        if (left := total_tokens - warmup) < decay:
            raise ValueError(
                f"model.learning_rate.decay is {self.decay}, and {most}{left:,} of the {total_tokens:,} tokens of the "
                f"run are left after the warm-up: give a share of the run, such as '20 %', or at most {left}"
            )

    def at(self, tokens: float, total_tokens: int) -> float:
        """Returns the rate of the optimizer step that *ends* after `tokens` tokens."""
        warmup, decay = self.parts(total_tokens)
        if tokens < warmup:
            return self.peak * tokens / warmup
        if self.shape != "wsd":
            left = self._fall(min(1.0, (tokens - warmup) / max(1, total_tokens - warmup)))
            return self.final + (self.peak - self.final) * left
        left = max(0.0, (total_tokens - tokens) / decay) if decay else 1.0
        return self.peak if left >= 1 else self.final + (self.peak - self.final) * left
