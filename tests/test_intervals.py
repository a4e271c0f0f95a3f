import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from lightning_danube.intervals import CONFIDENCE, Estimate, bootstrap, normal, percentiles, student, wilson

VALUES = np.random.default_rng(0).gamma(2.0, 1.5, 30)


@pytest.mark.parametrize(
    ("share", "count"), [(0.0, 1), (1.0, 1), (0.5, 1), (0.0, 40), (1.0, 40), (0.3, 10), (0.5125, 40)]
)
def test_wilsons_interval_is_that_of_statsmodels(share: float, count: int) -> None:
    from statsmodels.stats.proportion import proportion_confint

    expected = proportion_confint(share * count, count, method="wilson")
    assert wilson(share, count).ends == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_interval_holds_the_share_itself(share: float) -> None:
    # A bar whose error is -1e-18 long is refused by matplotlib.
    for count in range(1, 400):
        low, high = wilson(share, count).ends
        assert low <= share <= high


def test_students_interval_is_that_of_scipy() -> None:
    found = student(VALUES)
    expected = stats.ttest_1samp(VALUES, 0.0).confidence_interval(CONFIDENCE)
    assert found.value == pytest.approx(VALUES.mean())
    assert found.ends == pytest.approx((expected.low, expected.high))
    assert found.n == 30 and found.half == pytest.approx((expected.high - expected.low) / 2)


def test_the_normal_interval_is_narrower_than_students() -> None:
    found = normal(VALUES.tolist())
    assert found.stderr == pytest.approx(stats.sem(VALUES))
    assert found.ends == pytest.approx(stats.norm.interval(CONFIDENCE, VALUES.mean(), stats.sem(VALUES)), abs=1e-5)
    assert student(VALUES).ends[0] < found.ends[0] < found.value < found.ends[1] < student(VALUES).ends[1]


@pytest.mark.parametrize("of", [student, normal])
def test_one_value_has_no_interval(of: Callable[[list[float]], Estimate]) -> None:
    found = of([3.0])
    assert (found.value, found.low, found.high, found.half, found.n) == (3.0, None, None, None, 1)
    assert found.is_noise and f"{found:.2f}" == "3.00"
    with pytest.raises(AssertionError, match="too small"):
        assert found.ends


def test_the_bootstraps_interval_is_scipys_within_its_limits() -> None:
    expected = stats.bootstrap((VALUES,), np.mean, n_resamples=200, method="basic", rng=np.random.default_rng(3))
    found = bootstrap(VALUES, np.mean, resamples=200, method="basic", seed=3)
    assert found.ends == tuple(map(float, expected.confidence_interval))
    cut = bootstrap(VALUES, np.mean, resamples=200, seed=3, limits=(0.0, found.value))
    assert cut.ends[1] == found.value and cut.value == found.value
    assert bootstrap(VALUES[:1], np.mean, resamples=200, limits=(0.0, 1.0)).ends == (0.0, 1.0)


def test_percentiles_leave_out_as_much_at_each_end() -> None:
    low, high = percentiles(0.5, np.linspace(0, 1, 1001), 7).ends
    assert (low, high) == pytest.approx((0.025, 0.975), abs=1e-12)


def test_an_estimate_of_an_exponential() -> None:
    found = student(VALUES).map(math.exp)
    assert (found.value, *found.ends) == pytest.approx([math.exp(x) for x in (VALUES.mean(), *student(VALUES).ends)])


def test_an_estimate_in_words() -> None:
    estimate = Estimate(0.25, -0.5, 1.0, 9, "student")
    assert f"{estimate:+.2f}" == "+0.25 [-0.50, +1.00]"
    assert estimate.is_noise and not Estimate(0.25, 0.1, 0.4, 9, "student").is_noise


def test_intervals_cover_the_truth_in_95_of_100_samples() -> None:
    """By simulation. Bounds are about three standard errors of the simulation."""
    draw = np.random.default_rng(0)
    few = [student(sample).ends for sample in draw.normal(3.0, 2.0, (1500, 6))]
    assert np.mean([low <= 3 <= high for low, high in few]) == pytest.approx(0.95, abs=0.017)
    many = [normal(sample.tolist()).ends for sample in draw.normal(3.0, 2.0, (800, 40))]
    assert np.mean([low <= 3 <= high for low, high in many]) == pytest.approx(0.945, abs=0.024)
    covered = 0
    for sample in draw.normal(3.0, 2.0, (1000, 50)):
        means = sample[draw.integers(50, size=(200, 50))].mean(axis=1)
        low, high = percentiles(sample.mean(), means, 50).ends
        covered += low <= 3 <= high
    # Percentiles of 50 values cover a little less than they should.
    assert covered / 1000 == pytest.approx(0.94, abs=0.023)


def test_wilsons_interval_covers_a_share_in_95_of_100_samples() -> None:
    """Exactly, over all numbers of successes; a mean over shares, because the coverage oscillates."""
    n = 50
    ends = [wilson(successes / n, n).ends for successes in range(n + 1)]
    shares = np.linspace(0.05, 0.95, 181)
    covered = [
        sum(stats.binom.pmf(k, n, share) for k, (low, high) in enumerate(ends) if low <= share <= high)
        for share in shares
    ]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.005)


def test_an_interval_does_not_leave_the_range_of_the_statistic() -> None:
    inside = bootstrap(VALUES, np.mean, resamples=200)
    middle = inside.value - 0.01, inside.value + 0.01
    assert bootstrap(VALUES, np.mean, resamples=200, limits=middle).ends == middle
    assert bootstrap(VALUES, np.mean, resamples=200, limits=(0.0, 99.0)).ends == inside.ends


@pytest.mark.parametrize(("low", "high", "noise"), [(0.0, 1.0, True), (-1.0, 0.0, True), (0.0, 0.0, True)])
def test_an_interval_that_ends_at_zero_is_noise(low: float, high: float, noise: bool) -> None:
    assert Estimate((low + high) / 2, low, high, 9, "student").is_noise is noise
