"""Intervals beside SciPy's own, and what is told of noise."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lightning_danube.intervals import Estimate
from lightning_danube.quantization.levels import FULL, Level
from lightning_danube.quantization.measured import Content, MeasuredLevel
from lightning_danube.quantization.report import (
    accuracy_change,
    mean_over_windows,
    percent,
    perplexity,
    perplexity_change,
    recommendation,
    rows_of,
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


# --- rows and advice --------------------------------------------------------------------------------------------------

LEVELS = {name: Level("gguf", name, embeddings=True) for name in ("Q2_K", "Q4_0", "Q5_0", "Q8_0")}
CACHED = Level("gguf", "Q4_0", embeddings=True, cache="q4_0")
SHAKY = 0.03 * np.resize([1.0, -1.0], (12, 1))
"""Differences that leave an interval of about 4 % around a mean."""


def measured(size: int, worse: Any = 0.0, right: Any = True) -> MeasuredLevel:
    divergence = np.arange(101.0)[None].repeat(2, 0)
    same = np.full((2, 101), True)
    return MeasuredLevel(Content(size, 1, {}), 1.0, {40: NATS + worse}, divergence, same, np.resize(right, 10))


DONE = {
    FULL: measured(2**24, right=[True, True, True, False]),
    LEVELS["Q2_K"]: measured(2**21, 0.008 + SHAKY, right=[True, False]),
    CACHED: measured(2**20, 0.0),
    LEVELS["Q4_0"]: measured(2**22, 0.005),
    LEVELS["Q5_0"]: measured(2**22 + 1, 0.011),
    LEVELS["Q8_0"]: measured(2**23, 0.001),
}


def test_the_smallest_level_that_is_surely_good_enough_is_recommended() -> None:
    rows = rows_of(DONE, list(DONE)[1:], 40)
    at_1, at_5, beaten = recommendation([rows[0], *reversed(rows[1:])])
    assert "at most 1 % higher" in at_1 and "confidence: gguf:Q4_0, 4.0 MiB (4.0 times smaller), +0.50 %" in at_1
    assert "at most 5 % higher" in at_5 and "confidence: gguf:Q2_K, 2.0 MiB (8.0 times smaller), +0.80 %" in at_5
    # Of the smaller levels only Q2_K and Q4_0 are no worse; the smallest one is named.
    assert beaten == "beaten by a smaller one of no higher perplexity: gguf:Q5_0 (by gguf:Q2_K)"


def test_no_level_is_recommended_whose_interval_reaches_too_far() -> None:
    done = {level: DONE[level] for level in (FULL, LEVELS["Q2_K"])}
    at_1, at_5 = recommendation(rows_of(done, [LEVELS["Q2_K"]], 40))
    assert at_1.endswith("confidence: none of these levels") and "gguf:Q2_K" in at_5


def test_a_rows_values_are_relative_to_the_full_model() -> None:
    full, level = rows_of(DONE, [LEVELS["Q2_K"]], 40)
    assert full.level == FULL and full.change.value == 0
    assert level.change.value == pytest.approx(math.expm1(0.008))
    assert level.by_length[40][1] == level.change
    assert level.cloze is not None and level.cloze_change is not None
    # 5 of 10 right answers; the full model has 8.
    assert level.cloze.value == pytest.approx(0.5) and level.cloze_change.value == pytest.approx(-0.3)
    assert level.divergence_99 == pytest.approx(99.0)


def test_each_length_has_its_own_change() -> None:
    full, level = (replace(measured(8), nats={40: NATS + worse, 20: NATS + 3 * worse}) for worse in (0.0, 0.1))
    _, row = rows_of({FULL: full, LEVELS["Q2_K"]: level}, [LEVELS["Q2_K"]], 40)
    found = {length: change.value for length, (_, change) in row.by_length.items()}
    assert found == pytest.approx({40: math.expm1(0.1), 20: math.expm1(0.3)})
    assert row.by_length[20][0].value == pytest.approx(math.exp(NATS.mean() + 0.3))
