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
    lines = law_lines(fit_law(points), held_out, points)
    assert "measured" in lines[2] and lines[-1].startswith("extrapolated to danube3-4b at 6.0e+12 tokens")


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
    lines = law_lines(fit_law(points), None, points)
    assert lines[0].startswith("L = E") and "too few runs" in lines[2] and len(lines) == 5


def test_a_law_says_how_far_it_is_from_the_shortest_and_the_longest_runs() -> None:
    law = scaling.Law(np.array([1.0, 0.0, 1.0, 0.0, 1.0]), np.zeros((0, 5)), 0.0, 8)  # 1 nat/token everywhere
    points = [Point("a", 1e6, tokens, loss) for tokens, loss in ((1e6, 1.25), (1e5, 1.5), (1e5, 0.25), (1e7, 0.9))]
    assert law.errors(points) == pytest.approx({1e5: 0.75, 1e6: 0.25, 1e7: 0.1})
    assert scaling.error_text(law, points) == "0.75 nats/token at 100,000 tokens, 0.10 at 10,000,000"


def test_points_are_complete_runs() -> None:
    row = {"variant": "a", "state": "complete", SIZE: 10, TOKENS: 20, "val_loss.web": 3.0}
    assert points_of([row, {**row, "state": "failed", "val_loss.web": None}], "val_loss.web") == [
        Point("a", 10.0, 20.0, 3.0)
    ]


def fits_of(monkeypatch: pytest.MonkeyPatch, points: list[Point], seed: int = 0) -> list[list[Point]]:
    """Returns what each resample of a law is fitted to."""
    fitted: list[list[Point]] = []

    def fit(drawn: list[Point], start: np.ndarray) -> tuple[np.ndarray, float]:
        fitted.append(list(drawn))
        return np.ones(5), 1.0

    monkeypatch.setattr(scaling, "_fit", fit)
    law = fit_law(points, seed)
    assert len(law.resampled) == scaling.RESAMPLES
    return fitted[-scaling.RESAMPLES :]


def test_resamples_draw_groups_and_then_runs_within_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "RESAMPLES", 400)
    groups, runs = [], []
    for resample in fits_of(monkeypatch, made(0.01)):
        assert len(resample) == 60
        by_group: dict[str, list[float]] = {}
        for point in resample:
            by_group.setdefault(point.group, []).append(point.loss)
        assert all(len(losses) % 3 == 0 for losses in by_group.values())
        groups.append(len(by_group))
        runs += [len(set(losses)) for losses in by_group.values() if len(losses) == 3]
    # Of n draws with replacement from n, n (1 - (1 - 1/n)^n) are distinct in the mean.
    assert np.mean(groups) == pytest.approx(20 * (1 - 0.95**20), abs=0.3)
    assert np.mean(runs) == pytest.approx(3 * (1 - (2 / 3) ** 3), abs=0.05)


def test_resamples_follow_from_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    points = made(0.01)
    first = fits_of(monkeypatch, points, 1)
    assert first == fits_of(monkeypatch, points, 1) != fits_of(monkeypatch, points, 2)


def test_every_resample_has_enough_for_a_law(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [p for p in made(0.01) if p.size < 2e7 and p.tokens < 2e9 and p.group != "1e+06-1e+07"]
    for resample in fits_of(monkeypatch, points):
        assert len({p.group for p in resample}) >= 5
        assert len({p.size for p in resample}) == len({p.tokens for p in resample}) == 3


def test_the_best_of_the_fits_is_the_law(monkeypatch: pytest.MonkeyPatch) -> None:
    costs = [5.0, 3.0, 1.0, 2.0, 4.0, 9.0, 8.0, 7.0, 6.0]
    fits = iter(costs)
    monkeypatch.setattr(scaling, "_fit", lambda points, start: (np.full(5, cost := next(fits, 10.0)), cost))
    assert fit_law(made(0.0)).parameters.tolist() == [1.0] * 5


def test_intervals_of_a_law_are_over_its_resamples() -> None:
    draw = np.random.default_rng(0)
    parameters = np.array([1.7, 400.0, 0.34, 410.0, 0.28])
    resampled = parameters * np.exp(0.05 * draw.normal(size=(200, 5)))
    law = scaling.Law(parameters, resampled, 0.01, 12)
    losses = [E + A * 1e8**-alpha + B * 3e9**-beta for E, A, alpha, B, beta in resampled]
    assert law.loss(1e8, 3e9).ends == pytest.approx(np.quantile(losses, [0.025, 0.975]))
    for place, (name, one) in enumerate(law.coefficients().items()):
        assert one.ends == pytest.approx(np.quantile(resampled[:, place], [0.025, 0.975])), name


def test_one_run_that_went_wrong_does_not_move_the_law() -> None:
    points = made(0.0)
    worst = points[30]
    points[30] = Point(worst.group, worst.size, worst.tokens, 2 * worst.loss)
    found, _ = scaling._fit(points, np.array(list(TRUE.values())))
    for point in (*points[:30], worst, *points[31:]):
        assert scaling._loss(found, point.size, point.tokens) == pytest.approx(point.loss, rel=1e-3)


def test_what_is_held_out_is_a_mean_over_its_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "_fit", lambda points, start: (np.ones(5), 1.0))
    points = made(0.01)
    largest = [point.loss for point in points if (point.size, point.tokens) == (1e8, 1e10)]
    held_out = predict_largest(points)
    assert held_out is not None and len(set(largest)) == 3
    assert held_out.measured == pytest.approx(np.mean(largest))


def test_runs_that_have_no_result_yet_are_no_points() -> None:
    row = {"variant": "a", "state": "waiting", SIZE: None, TOKENS: None, "val_loss.web": None}
    assert points_of([row, {**row, "state": "running"}], "val_loss.web") == []
