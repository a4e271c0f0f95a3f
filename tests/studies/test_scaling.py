"""The scaling law: found again in losses that were made by one."""

import numpy as np
import pytest

from lightning_danube.studies import scaling
from lightning_danube.studies.scaling import SIZE, TOKENS, Point, fit_law, law_lines, points_of, predict_largest

TRUE = {"E": 1.7, "A": 400.0, "alpha": 0.34, "B": 410.0, "beta": 0.28}
"""Near those of Hoffmann et al."""


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "RESAMPLES", 60)


def made(noise: float) -> list[Point]:
    generator = np.random.default_rng(1)
    return [
        Point(
            f"{size:.0e}-{tokens:.0e}",
            size,
            tokens,
            (TRUE["E"] + TRUE["A"] * size ** -TRUE["alpha"] + TRUE["B"] * tokens ** -TRUE["beta"])
            * float(np.exp(noise * generator.normal())),
        )
        for size in (1e6, 3e6, 1e7, 3e7, 1e8)
        for tokens in (1e7, 1e8, 1e9, 1e10)
        for _ in range(3)
    ]


def test_a_law_without_noise_is_found_again() -> None:
    law = fit_law(made(0.0))
    for name, one in law.coefficients().items():
        # The data determine A and B less well than the exponents: they are the law's values at one parameter or token.
        assert one.value == pytest.approx(TRUE[name], rel=1e-2), name
    assert law.error < 1e-5
    expected = TRUE["E"] + TRUE["A"] * 4e9 ** -TRUE["alpha"] + TRUE["B"] * 6e12 ** -TRUE["beta"]
    assert law.loss(4e9, 6e12).value == pytest.approx(expected, rel=1e-3)


def test_intervals_hold_the_truth_of_noisy_losses() -> None:
    law = fit_law(made(0.01))
    for name, one in law.coefficients().items():
        assert one.ends[0] < TRUE[name] < one.ends[1], name
    assert 0.005 < law.error < 0.02
    # Further away less is known.
    near, far = law.loss(1e7, 1e9).half, law.loss(4e9, 6e12).half
    assert near is not None and far is not None and far > 2 * near


def test_the_largest_runs_are_predicted_without_them() -> None:
    points = made(0.002)
    held_out = predict_largest(points)
    assert held_out is not None and held_out.group == "1e+08-1e+10"
    assert held_out.predicted.ends[0] < held_out.measured < held_out.predicted.ends[1]
    # It has not seen them: with other losses there it says the same.
    others = [Point(p.group, p.size, p.tokens, 9.0 if p.group == held_out.group else p.loss) for p in points]
    again = predict_largest(others)
    assert again is not None and again.predicted == held_out.predicted
    lines = law_lines(fit_law(points), held_out)
    assert "measured" in lines[1] and lines[-1].startswith("extrapolated to danube3-4b at 6.0e+12 tokens")


def test_too_few_runs_have_no_law() -> None:
    points = [point for point in made(0.0) if point.size < 5e6]
    with pytest.raises(ValueError, match="3 numbers of tokens and 8 variants; there are 2, 4 and 8"):
        fit_law(points)


def test_runs_that_just_suffice_have_a_law_though_nothing_is_left_out() -> None:
    sizes, tokens = (1e6, 3e6, 1e7), (1e7, 1e8, 1e9)
    points = [point for point in made(0.002) if point.size in sizes and point.tokens in tokens]
    points = [point for point in points if point.group != "1e+06-1e+07"]
    assert len({point.group for point in points}) == 8
    assert predict_largest(points) is None
    lines = law_lines(fit_law(points), None)
    assert lines[0].startswith("L = E") and "too few runs" in lines[1] and len(lines) == 4


def test_points_are_complete_runs() -> None:
    row = {"variant": "a", "state": "complete", SIZE: 10, TOKENS: 20, "val_loss.web": 3.0}
    assert points_of([row, {**row, "state": "failed", "val_loss.web": None}], "val_loss.web") == [
        Point("a", 10.0, 20.0, 3.0)
    ]
