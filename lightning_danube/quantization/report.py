"""Turns measurements into the rows of a table, and into a recommendation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_danube.intervals import Estimate, student
from lightning_danube.quantization.levels import FULL, Level
from lightning_danube.quantization.measured import Array, MeasuredLevel

TOLERANCES = (0.01, 0.05)
"""Relative rise in perplexity that a recommended level may have."""
MIB = 2**20
BROKEN = 10.0
"""Relative changes above this are reported as factors, not in per cent."""


@dataclass(frozen=True)
class Row:
    """One level. Changes are relative to the full model, paired over the same tokens or questions."""

    level: Level
    measured: MeasuredLevel
    nats: Array
    """(windows, tokens) of the first context length, at which everything except `by_length` is measured."""
    perplexity: Estimate
    change: Estimate
    divergence: Estimate
    divergence_99: float
    same_first: Estimate
    cloze: Estimate | None
    cloze_change: Estimate | None
    by_length: Mapping[int, tuple[Estimate, Estimate]]
    """Context length → perplexity and its change."""

    def flat(self) -> dict[str, Any]:
        """Returns plain values for a table: sizes in bytes, shares as fractions."""
        content, cost = self.measured.content, self.measured.cost
        values: dict[str, Any] = {
            "level": self.level.name,
            "method": self.level.method,
            "type": self.level.type,
            "tensor_bytes": content.tensor_bytes,
            "bits_per_weight": content.bits_per_weight,
            "fallbacks": sum(content.fallbacks.values()),
            "fallback_types": ", ".join(f"{count} {kind}" for kind, count in content.fallbacks.items()),
        }
        estimates = {
            "perplexity": self.perplexity,
            "perplexity_change": self.change,
            "divergence": self.divergence,
            "same_first": self.same_first,
            "cloze_accuracy": self.cloze,
            "cloze_accuracy_change": self.cloze_change,
        }
        for length, (value, change) in self.by_length.items():
            estimates |= {f"perplexity_{length}": value, f"perplexity_change_{length}": change}
        for name, estimate in estimates.items():
            values[name], values[f"{name}_low"], values[f"{name}_high"] = (
                getattr(estimate, what, None) for what in ("value", "low", "high")
            )
        values |= {
            "perplexity_change_is_noise": self.level != FULL and self.change.is_noise,
            "divergence_99": self.divergence_99,
            "windows": len(self.nats),
            "tokens": self.nats.size,
            "divergence_tokens": int(self.measured.divergence.size),
            "cloze_questions": len(self.measured.cloze),
            "prefill_tokens_per_second": None if cost is None else cost.prefill_tokens_per_second,
            "decode_tokens_per_second": None if cost is None else cost.decode_tokens_per_second,
            "peak_memory_bytes": None if cost is None else cost.peak_memory_bytes,
            "seconds": self.measured.seconds,
        }
        return values


def rows_of(done: Mapping[Level, MeasuredLevel], order: Sequence[Level], primary: int) -> list[Row]:
    """Returns a row for each level that was measured, the full model first.

    Args:
        primary: the context length for every value except `by_length`.
    """
    full = done[FULL]
    rows = []
    for level in [FULL, *(level for level in order if level in done)]:
        one = done[level]
        rows.append(
            Row(
                level,
                one,
                one.nats[primary],
                perplexity(one.nats[primary]),
                perplexity_change(one.nats[primary], full.nats[primary]),
                mean_over_windows(one.divergence),
                float(np.quantile(one.divergence, 0.99)),
                mean_over_windows(one.same_first),
                mean_over_windows(one.cloze) if len(one.cloze) else None,
                accuracy_change(one.cloze, full.cloze) if len(one.cloze) else None,
                {
                    length: (perplexity(nats), perplexity_change(nats, full.nats[length]))
                    for length, nats in one.nats.items()
                },
            )
        )
    return rows


def recommendation(rows: Sequence[Row]) -> list[str]:
    """Returns the advice in words: the smallest level that is surely not much worse, and the levels to avoid."""
    full = rows[0]
    # Levels that differ only in the cache have the same weights.
    levels = sorted(
        (row for row in rows[1:] if row.level.cache is None), key=lambda row: row.measured.content.tensor_bytes
    )
    lines = []
    for tolerance in TOLERANCES:
        fit = next((row for row in levels if row.change.high is not None and row.change.high <= tolerance), None)
        if fit is None:
            lines.append(
                f"perplexity at most {100 * tolerance:.0f} % higher, with 95 % confidence: none of these levels"
            )
            continue
        smaller = full.measured.content.tensor_bytes / fit.measured.content.tensor_bytes
        lines.append(
            f"perplexity at most {100 * tolerance:.0f} % higher, with 95 % confidence: {fit.level.name}, "
            f"{fit.measured.content.tensor_bytes / MIB:.1f} MiB ({smaller:.1f} times smaller), {percent(fit.change)}"
        )
    beaten = []
    for place, row in enumerate(levels):
        better = [other for other in levels[:place] if other.perplexity.value <= row.perplexity.value]
        if better:
            beaten.append(f"{row.level.name} (by {better[0].level.name})")
    if beaten:
        lines.append(f"beaten by a smaller one of no higher perplexity: {', '.join(beaten)}")
    return lines


def mean_over_windows(values: Array) -> Estimate:
    """Returns the mean of windows (W, N), or of questions (Q,), with an interval over the windows or the questions.

    Tokens of one window depend on each other, so the sample is the windows, not their tokens.
    """
    sample = values.astype(np.float64)
    return student(sample.mean(1) if sample.ndim == 2 else sample)


def perplexity(nats: Array) -> Estimate:
    return mean_over_windows(nats).map(math.exp)


def perplexity_change(nats: Array, full: Array) -> Estimate:
    """Returns the relative difference from the full model's perplexity, paired over the same tokens."""
    return mean_over_windows(nats.astype(np.float64) - full.astype(np.float64)).map(math.expm1)


def accuracy_change(right: Array, full: Array) -> Estimate:
    """Returns the difference from the full model's share of right answers, paired over the same questions."""
    return mean_over_windows(right.astype(np.float64) - full.astype(np.float64))


def percent(change: Estimate, *, with_interval: bool = True) -> str:
    """Formats a change as +1.23 % [+0.98, +1.49], or as × 25,412 where the quantized model is useless."""
    if change.value > BROKEN:
        return f"× {1 + change.value:,.0f}"
    value = f"{100 * change.value:+.2f} %"
    if not with_interval or change.low is None or change.high is None:
        return value
    return f"{value} [{100 * change.low:+.2f}, {100 * change.high:+.2f}]"
