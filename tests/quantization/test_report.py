"""Intervals beside SciPy's own, and what is told of noise."""

import math

import numpy as np
import pytest
from scipy import stats

from lightning_danube.intervals import Estimate
from lightning_danube.quantization.report import (
    accuracy_change,
    mean_over_windows,
    percent,
    perplexity,
    perplexity_change,
)

NATS = np.random.default_rng(0).gamma(2.0, 1.5, (12, 40))


def test_windows_are_what_is_counted() -> None:
    found = mean_over_windows(NATS)
    means = NATS.mean(1)
    wanted = stats.t.interval(0.95, len(means) - 1, means.mean(), stats.sem(means))
    assert found.value == pytest.approx(NATS.mean())
    assert (found.low, found.high) == pytest.approx(wanted)
    ends = perplexity(NATS)
    assert (ends.value, *ends.ends) == pytest.approx((math.exp(NATS.mean()), *map(math.exp, wanted)))


def test_a_change_is_paired() -> None:
    rng = np.random.default_rng(1)
    worse = NATS + 0.02 + 0.001 * rng.standard_normal(NATS.shape)
    found = perplexity_change(worse, NATS)
    wanted = stats.ttest_rel(worse.mean(1), NATS.mean(1)).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((math.expm1(wanted.low), math.expm1(wanted.high)))
    assert not found.is_noise
    # Apart, the two are not to be told from each other.
    assert perplexity(worse).low < perplexity(NATS).high  # type: ignore[operator]
    assert perplexity_change(NATS + 0.01 * rng.standard_normal(NATS.shape), NATS).is_noise


def test_changes_in_words() -> None:
    assert percent(Estimate(0.0123, 0.0098, 0.0149, 9, "student")) == "+1.23 % [+0.98, +1.49]"
    assert percent(Estimate(0.0123, 0.0098, 0.0149, 9, "student"), with_interval=False) == "+1.23 %"
    assert percent(Estimate(-0.0123, None, None, 1, "student")) == "-1.23 %"
    assert percent(Estimate(25411.0, 20000.0, 30000.0, 9, "student")) == "× 25,412"


def test_one_window_has_no_interval() -> None:
    found = perplexity(NATS[:1])
    assert (found.low, found.high) == (None, None) and found.is_noise


def test_accuracies_are_compared_question_by_question() -> None:
    full = np.array([True] * 60 + [False] * 40)
    one = full.copy()
    one[:30] = False
    found = accuracy_change(one, full)
    wanted = stats.ttest_rel(one.astype(float), full.astype(float)).confidence_interval(0.95)
    assert found.value == pytest.approx(-0.3)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    same = accuracy_change(full, full)
    assert (same.value, *same.ends) == (0.0, 0.0, 0.0)
