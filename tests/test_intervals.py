import pytest

from lightning_danube.intervals import wilson


@pytest.mark.parametrize(
    ("share", "count"), [(0.0, 1), (1.0, 1), (0.5, 1), (0.0, 40), (1.0, 40), (0.3, 10), (0.5125, 40)]
)
def test_wilsons_interval_is_that_of_statsmodels(share: float, count: int) -> None:
    from statsmodels.stats.proportion import proportion_confint

    expected = proportion_confint(share * count, count, method="wilson")
    assert wilson(share, count) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_interval_holds_the_share_itself(share: float) -> None:
    # A bar whose error is -1e-18 long is refused by matplotlib.
    for count in range(1, 400):
        low, high = wilson(share, count)
        assert low <= share <= high
