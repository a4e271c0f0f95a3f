import pytest

from lightning_danube.intervals import wilson


@pytest.mark.parametrize(
    ("share", "count"), [(0.0, 1), (1.0, 1), (0.5, 1), (0.0, 40), (1.0, 40), (0.3, 10), (0.5125, 40)]
)
def test_wilsons_interval_is_that_of_statsmodels(share: float, count: int) -> None:
    from statsmodels.stats.proportion import proportion_confint

    expected = proportion_confint(share * count, count, method="wilson")
    assert wilson(share, count) == pytest.approx(expected, abs=1e-12)
