"""Differences paired by seed, beside what SciPy and statsmodels say of them, and what is told in words."""

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.power import TTestPower

from lightning_danube.studies import comparison
from lightning_danube.studies.comparison import _power, compare, verdict

SEEDS = range(1, 6)
BASE = {seed: 5.0 + 0.3 * seed for seed in SEEDS}
NOISE = dict(zip(SEEDS, (0.01, -0.012, 0.004, 0.003, -0.005), strict=True))


def shifted(by: float, size: float = 1.0) -> dict[int, float]:
    return {seed: BASE[seed] + by + size * NOISE[seed] for seed in SEEDS}


def test_pairs_are_compared() -> None:
    (one,) = compare({"base": BASE, "new": shifted(-0.05)}, "base")
    test = stats.ttest_rel(list(shifted(-0.05).values()), list(BASE.values()))
    interval = test.confidence_interval(0.95)
    assert one.difference.n == 5 and one.difference.value == pytest.approx(-0.05)
    assert one.difference.ends == pytest.approx((interval.low, interval.high))
    assert one.p == pytest.approx(test.pvalue)
    differences = np.array(list(NOISE.values())) - 0.05
    assert one.effect == pytest.approx(differences.mean() / differences.std(ddof=1))
    assert one.resampled is not None
    (low, high), (lowest, highest) = one.resampled.ends, one.difference.ends
    assert lowest < low < one.difference.value < high < highest
    # A tenth of the spread between the seeds themselves: not in pairs, nothing would be seen.
    assert one.is_detected and stats.ttest_ind(list(shifted(-0.05).values()), list(BASE.values())).pvalue > 0.5
    assert verdict(one, "base", "val_loss.web", "lower").startswith(
        "new is better than base: -0.05 in val_loss.web (95 %"
    )
    assert "new is worse than base" in verdict(one, "base", "accuracy", "higher")


@pytest.mark.medium
def test_several_variants_are_judged_together() -> None:
    values = {"base": BASE, "a": shifted(-0.012), "b": shifted(-0.011), "c": shifted(0.0001)}
    alone = [compare({"base": BASE, name: values[name]}, "base")[0].p for name in "abc"]
    together = [one.p for one in compare(values, "base")]
    assert together[0] == pytest.approx(3 * alone[0])  # type: ignore[operator]
    assert all(a <= b for a, b in zip(alone, together, strict=True))  # type: ignore[operator]


def test_what_was_not_seen_tells_what_would_have_been() -> None:
    (one,) = compare({"base": BASE, "new": shifted(0.003)}, "base")
    assert not one.is_detected and one.effect is not None and one.visible is not None
    assert TTestPower().power(one.visible / (one.difference.value / one.effect), 5, 0.05) == pytest.approx(
        0.8, abs=1e-3
    )
    assert one.seeds_needed is not None
    for seeds, enough in ((one.seeds_needed, True), (one.seeds_needed - 1, False)):
        assert (TTestPower().power(one.effect, seeds, 0.05) >= 0.8) == enough
    said = verdict(one, "base", "loss", "lower")
    assert said.startswith("no difference is detected between new and base: +0.003 in loss")
    assert f"needs about {one.seeds_needed} seeds" in said
    (none,) = compare({"base": BASE, "new": shifted(0.0000001)}, "base")
    assert none.seeds_needed is None and "more than 1,000 seeds" in verdict(none, "base", "loss", "lower")


def test_the_power_of_a_test_has_no_holes() -> None:
    """SciPy's noncentral t is not a number for some large counts: 0.654 standard deviations with 200 pairs, for one."""
    for effect in (0.05, 0.654, 1.5):
        powers = [_power(effect, count) for count in (5, 20, 21, 200, 500, 1000)]
        assert powers == sorted(powers) and all(0 < power <= 1 for power in powers)
    assert _power(0.654, 20) < 0.8 < _power(0.654, 21)
    found = compare({"a": {1: 0.0, 2: 0.0, 3: 0.0}, "b": {1: 0.0, 2: 1.0, 3: 1.5}}, "a")[0]
    assert found.seeds_needed is not None and found.seeds_needed < 20


def test_one_seed_has_no_verdict() -> None:
    (one,) = compare({"base": {1: 2.0}, "new": {1: 1.0}}, "base")
    assert one.p is None and not one.is_detected
    assert verdict(one, "base", "loss", "lower") == "new: -1 in loss from one seed, which tells nothing: run more"


def test_only_common_seeds_count() -> None:
    found = compare({"base": {1: 2.0, 2: 2.1}, "a": {2: 2.0, 3: 9.0}, "b": {3: 1.0}}, "base")
    assert [(one.variant, one.difference.n) for one in found] == [("a", 1)]


def test_differences_that_are_all_alike() -> None:
    (same, lower) = compare({"base": {1: 2.0, 2: 3.0}, "same": {1: 2.0, 2: 3.0}, "lower": {1: 1.5, 2: 2.5}}, "base")
    assert not same.is_detected and lower.is_detected


def test_p_values_are_adjusted_as_holm_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Holm (1979): the i-th smallest of m is multiplied by m - i + 1, and none is below the one before."""
    monkeypatch.setattr(comparison, "RESAMPLES", 100)
    sizes = {"a": -0.02, "b": 0.011, "c": -0.0135, "d": 0.0001, "e": 0.006}
    values = {"base": BASE, **{name: shifted(by) for name, by in sizes.items()}}
    alone = {name: stats.ttest_rel(list(values[name].values()), list(BASE.values())).pvalue for name in sizes}
    expected, highest = {}, 0.0
    for place, name in enumerate(sorted(alone, key=alone.__getitem__)):
        highest = max(highest, min(1.0, (len(alone) - place) * alone[name]))
        expected[name] = highest
    assert {one.variant: one.p for one in compare(values, "base")} == pytest.approx(expected)
    second = sorted(alone.values())[1]
    assert sorted(expected.values())[1] == pytest.approx(4 * second)  # Bonferroni's would be 5 times


def test_a_difference_between_five_and_ten_percent_is_not_seen() -> None:
    (one,) = compare({"base": BASE, "new": shifted(0.0092)}, "base")
    assert one.p is not None and 0.05 < one.p < 0.1
    assert not one.is_detected and one.difference.is_noise
    assert verdict(one, "base", "loss", "lower").startswith("no difference is detected")
