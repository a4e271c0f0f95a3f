import math

import pytest

from lightning_danube.training.optim import LearningRate


def test_cosine_goes_through_hand_computed_values() -> None:
    rate = LearningRate(peak=2e-4, final=1e-5, warmup=100)
    assert rate.at(0, 1100) == 0
    assert rate.at(50, 1100) == pytest.approx(1e-4)
    assert rate.at(100, 1100) == pytest.approx(2e-4)
    assert rate.at(600, 1100) == pytest.approx((2e-4 + 1e-5) / 2)  # half of the way down
    assert rate.at(350, 1100) == pytest.approx(1e-5 + 1.9e-4 * (1 + math.sqrt(0.5)) / 2)  # a quarter
    assert rate.at(1100, 1100) == pytest.approx(1e-5)


def test_linear_falls_evenly_after_the_warm_up() -> None:
    rate = LearningRate(peak=1e-3, final=2e-4, warmup=100, shape="linear")
    assert rate.at(50, 1100) == pytest.approx(5e-4)
    assert [rate.at(t, 1100) for t in (100, 600, 850, 1100)] == pytest.approx([1e-3, 6e-4, 4e-4, 2e-4])


def test_wsd_stays_at_the_peak_and_falls_at_the_end() -> None:
    rate = LearningRate(peak=1e-3, final=1e-4, warmup="0.1K", shape="wsd", decay=200)
    assert [rate.at(t, 1000) for t in (100, 500, 800)] == pytest.approx([1e-3] * 3)
    assert rate.at(900, 1000) == pytest.approx((1e-3 + 1e-4) / 2)
    assert rate.at(1000, 1000) == pytest.approx(1e-4)


def test_shares_are_parts_of_the_whole_run() -> None:
    """Compares with the schedule whose tokens are computed by hand: 5 % and 20 % of 4,000 tokens, then of 80."""
    shares = LearningRate(peak=1e-3, final=1e-4, warmup="5 %", shape="wsd", decay="20%")
    for total, warmup, decay in ((4000, 200, 800), (80, 4, 16)):
        tokens = LearningRate(peak=1e-3, final=1e-4, warmup=warmup, shape="wsd", decay=decay)
        shares.check(total)
        assert [shares.at(t, total) for t in range(total + 1)] == [tokens.at(t, total) for t in range(total + 1)]


def test_without_a_decay_the_rate_stays_at_the_peak() -> None:
    for none in (0, "0", "0 %"):
        rate = LearningRate(peak=1e-3, final=0.0, warmup=10, shape="wsd", decay=none)
        assert [rate.at(t, 100) for t in (10, 99, 100)] == [1e-3] * 3


def squared(done: float) -> float:
    return (1 - done) ** 2


NO_FUNCTION = 3


def test_a_fall_of_ones_own_is_named_by_its_function() -> None:
    rate = LearningRate(peak=1.0, final=0.2, warmup=100, shape=f"{__name__}.squared")
    assert [rate.at(t, 1100) for t in (50, 100, 600, 1100)] == pytest.approx([0.5, 1.0, 0.2 + 0.8 / 4, 0.2])


def test_no_warm_up_starts_at_the_peak() -> None:
    assert LearningRate(peak=1e-3, final=0.0, warmup=0).at(0, 100) == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peak": 1e-4, "final": 1e-3, "warmup": 1}, "learning rate falls from peak 0.0001 to final 0.001"),
        ({"peak": 0.0, "final": 0.0, "warmup": 1}, "learning rate falls from peak 0.0"),
        ({"peak": float("nan"), "final": 0.0, "warmup": 1}, "learning rate falls from peak nan"),
        (
            {"peak": 1.0, "final": 0.0, "warmup": "many"},
            "warmup is 'many': give tokens such as 1048576, 700K, 1.15T, or a share of the run such as '5 %'",
        ),
        (
            {"peak": 1.0, "final": 0.0, "warmup": 1, "shape": "step"},
            "shape is 'step': choose cosine, linear or wsd, or",
        ),
        (
            {"peak": 1.0, "final": 0.0, "warmup": 1, "shape": "nowhere.f"},
            "shape is 'nowhere.f', which cannot be imported",
        ),
        (
            {"peak": 1.0, "final": 0.0, "warmup": 1, "shape": f"{__name__}.NO_FUNCTION"},
            "NO_FUNCTION', which is not a function: choose cosine, linear or wsd, or name your own function",
        ),
        ({"peak": 1.0, "final": 0.0, "warmup": 0.05}, "warmup is 0.05: give .* or a share of the run such as '5 %'"),
        ({"peak": 1.0, "final": 0.0, "warmup": "120 %"}, "warmup is '120 %', more than the whole run"),
        (
            {"peak": 1.0, "final": 0.0, "warmup": "30 %", "shape": "wsd", "decay": "80 %"},
            "warmup 30 % and decay 80 % are more than the whole run: together at most 100 %",
        ),
        ({"peak": 1.0, "final": 0.0, "warmup": 1, "decay": 5}, "decay is 5 with shape 'cosine'"),
        (
            {"peak": 1.0, "final": 0.0, "warmup": 1, "shape": "wsd"},
            "decay is not given, and shape 'wsd' needs it: give",
        ),
    ],
)
def test_impossible_schedules_are_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LearningRate(**arguments)  # type: ignore[arg-type]


def test_a_schedule_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.learning_rate\.warmup is 16K, .* has 4,096 tokens: .* at most 4096$"):
        LearningRate(peak=1.0, final=0.1, warmup="16K").check(4096)
    with pytest.raises(ValueError, match=r"model\.learning_rate\.decay is 50, and 0 of the 100 tokens .* at most 0$"):
        LearningRate(peak=1.0, final=0.1, warmup=100, shape="wsd", decay=50).check(100)
    with pytest.raises(ValueError, match=r"warmup is 16K, and the whole run has at most 4,096 tokens: give a share"):
        LearningRate(peak=1.0, final=0.1, warmup="16K").check(4096, is_limit=True)
    with pytest.raises(ValueError, match=r"decay is 50, and at most 20 of the 120 tokens of the run are left after"):
        LearningRate(peak=1.0, final=0.1, warmup=100, shape="wsd", decay=50).check(120, is_limit=True)


def test_a_schedule_as_long_as_the_run_is_allowed() -> None:
    rate = LearningRate(peak=1.0, final=0.1, warmup=100, shape="wsd", decay=50)
    rate.check(150)
    assert [rate.at(tokens, 150) for tokens in (50, 100, 125, 150)] == pytest.approx([0.5, 1.0, 0.55, 0.1])
    with pytest.raises(ValueError, match=r"decay is 50, and 49 of the 149 tokens"):
        rate.check(149)
