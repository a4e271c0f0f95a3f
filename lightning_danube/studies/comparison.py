"""Compares variants with the baseline, paired by seed: mean difference, intervals, effect size, and the smallest
difference that would be detected. SciPy and statsmodels compute every number."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from lightning_danube.intervals import CONFIDENCE, Estimate, bootstrap, student
from lightning_danube.terminal import amount

POWER = 0.8
RESAMPLES = 10_000
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Comparison:
    """A variant against the baseline, over the seeds that both have.

    Args:
        variant: name of the variant.
        difference: mean over the pairs of the variant's metric minus the baseline's, with Student's interval.
        resampled: this difference with the percentile interval over resampled pairs; None for one pair.
        effect: Cohen's d of the pairs: the mean difference in standard deviations of the differences.
        p: two-sided p-value of the paired differences, adjusted by Holm for all variants of the study.
        visible: the smallest difference that this number of seeds would detect with a power of 80 %.
        seeds_needed: number of pairs that would detect the measured difference with a power of 80 %; None if more than
            1,000.
    """

    variant: str
    difference: Estimate
    resampled: Estimate | None = None
    effect: float | None = None
    p: float | None = None
    visible: float | None = None
    seeds_needed: int | None = None

    @property
    def is_detected(self) -> bool:
        """Returns whether the difference is significant, adjusted for all variants."""
        return self.p is not None and self.p < 1 - CONFIDENCE

    def as_row(self) -> dict[str, Any]:
        """Returns the comparison as plain values for files."""
        return {
            "variant": self.variant,
            "seeds": self.difference.n,
            "mean": self.difference.value,
            "low": self.difference.low,
            "high": self.difference.high,
            "bootstrap": None if self.resampled is None else self.resampled.ends,
            "effect": self.effect,
            "p": self.p,
            "visible": self.visible,
            "seeds_needed": self.seeds_needed,
        }


def compare(values: Mapping[str, Mapping[int, float]], baseline: str) -> list[Comparison]:
    """Returns a comparison with the baseline for each other variant.

    Args:
        values: variant → seed → metric.
        baseline: the variant to compare with.
    """
    from statsmodels.stats.multitest import multipletests

    base = values.get(baseline, {})
    found = []
    for variant, by_seed in values.items():
        common = [seed for seed in by_seed if seed in base]
        if variant != baseline and common:
            found.append(_paired(variant, [by_seed[seed] - base[seed] for seed in common]))
    tested = [place for place, one in enumerate(found) if one.p is not None]
    if tested:
        _, adjusted, _, _ = multipletests([found[place].p for place in tested], method="holm")
        for place, p in zip(tested, adjusted, strict=True):
            found[place] = replace(found[place], p=float(p))
    return found


def _paired(variant: str, differences: Sequence[float]) -> Comparison:
    from scipy import stats
    from statsmodels.stats.power import TTestPower

    values = np.array(differences, float)
    count, mean = len(values), float(values.mean())
    if count < 2:
        return Comparison(variant, student(values))
    spread = float(values.std(ddof=1))
    if spread == 0:
        # All pairs have an equal difference, so the differences do not vary.
        sure, resampled = (Estimate(mean, mean, mean, count, method) for method in ("student", "bootstrap"))
        return Comparison(variant, sure, resampled, None, 1.0 if mean == 0 else 0.0, 0.0, 2)
    test = stats.ttest_1samp(values, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    effect = mean / spread
    with warnings.catch_warnings():
        # If no number of seeds suffices, the solver warns and returns its last attempt.
        warnings.simplefilter("ignore")
        visible = float(np.squeeze(TTestPower().solve_power(nobs=count, alpha=1 - CONFIDENCE, power=POWER))) * spread
        needed = next((n for n in range(2, MOST_SEEDS + 1) if _power(abs(effect), n) >= POWER), None)
    return Comparison(
        variant,
        Estimate(mean, float(interval.low), float(interval.high), count, "student"),
        bootstrap(values, np.mean, resamples=RESAMPLES),
        effect,
        float(test.pvalue),
        visible if math.isfinite(visible) else None,
        needed,
    )


def _power(effect: float, count: int) -> float:
    """Returns the power of a paired t-test. Where SciPy's noncentral t gives no number, uses the normal limit."""
    from statsmodels.stats.power import NormalIndPower, TTestPower

    found = float(TTestPower().power(effect, count, 1 - CONFIDENCE))
    if math.isfinite(found):
        return found
    return float(NormalIndPower(ddof=0).power(effect, count, 1 - CONFIDENCE, ratio=0))


def verdict(one: Comparison, baseline: str, metric: str, better: Literal["lower", "higher"]) -> str:
    """Returns the result of a comparison in words. From one seed there is no verdict."""
    mean, seeds = one.difference.value, one.difference.n
    if one.difference.low is None or one.difference.high is None:
        return f"{one.variant}: {_signed(mean)} in {metric} from one seed, which tells nothing: run more"
    ends = f"95 % interval {_signed(one.difference.low)} to {_signed(one.difference.high)}, {seeds} seeds"
    if one.is_detected:
        word = "better" if (mean < 0) == (better == "lower") else "worse"
        return f"{one.variant} is {word} than {baseline}: {_signed(mean)} in {metric} ({ends}, p = {one.p:.2g})"
    needed = "more than 1,000" if one.seeds_needed is None else f"about {one.seeds_needed}"
    visible = "" if one.visible is None else f"; {amount(seeds, 'seed')} would detect a difference of {one.visible:.2g}"
    return (
        f"no difference is detected between {one.variant} and {baseline}: {_signed(mean)} in {metric} ({ends}, "
        f"p = {one.p:.2g}){visible}; to detect one as small as this needs {needed} seeds"
    )


def _signed(value: float) -> str:
    return f"{value:+.4g}"
