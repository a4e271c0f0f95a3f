"""Fits a scaling law to the runs of a study: loss by size and by tokens, with its uncertainty.

L(N, D) = E + A·N^−α + B·D^−β of Hoffmann et al. (arXiv 2203.15556, approach 3), with their Huber loss on the logarithm.
N is the number of parameters without the input embedding, D the number of training tokens, L nats/token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_danube.intervals import Estimate, percentiles

SIZE, TOKENS = "parameters_without_embedding", "tokens"
"""Keys of a pre-training run's `summary.json` that the law depends on."""
RESAMPLES = 500
HUBER = 1e-3
_NAMES = ("E", "A", "alpha", "B", "beta")


@dataclass(frozen=True)
class Point:
    """One run.

    Args:
        group: the run's variant; runs of one group differ by their seed.
        size: parameters without the input embedding.
        tokens: number of training tokens.
        loss: nats/token.
    """

    group: str
    size: float
    tokens: float
    loss: float


@dataclass(frozen=True)
class Law:
    """L(N, D), fitted to all runs, and to each of R resamples of the groups.

    Args:
        parameters: (5,): E (nats), A, alpha, B, beta.
        resampled: (R, 5), the parameters for each resample.
        error: root mean square of ln(measured / fitted).
        groups: how many groups of runs it was fitted to.
    """

    parameters: NDArray[np.float64]
    resampled: NDArray[np.float64]
    error: float
    groups: int

    def loss(self, size: float, tokens: float) -> Estimate:
        """Returns the loss in nats/token at a size and a number of tokens.

        The interval covers the choice of runs. It does not cover that the form of the law might not hold there.
        """
        resampled = _loss(self.resampled.T, size, tokens)
        return percentiles(_loss(self.parameters, size, tokens), resampled, self.groups)

    def errors(self, points: Sequence[Point]) -> dict[float, float]:
        """Returns number of training tokens → the largest distance in nats/token between a point and the law."""
        found: dict[float, float] = {}
        for point in sorted(points, key=lambda point: point.tokens):
            error = abs(point.loss - float(_loss(self.parameters, point.size, point.tokens)))
            found[point.tokens] = max(error, found.get(point.tokens, 0.0))
        return found

    def coefficients(self) -> dict[str, Estimate]:
        """Returns E, A, alpha, B and beta with intervals."""
        return {
            name: percentiles(self.parameters[place], self.resampled[:, place], self.groups)
            for place, name in enumerate(_NAMES)
        }


def _loss(parameters: Any, size: Any, tokens: Any) -> Any:
    E, A, alpha, B, beta = parameters
    return E + A * size**-alpha + B * tokens**-beta


def points_of(rows: Sequence[Mapping[str, Any]], metric: str) -> list[Point]:
    """Returns a point for each complete run in the rows of a study's table."""
    return [
        Point(str(row["variant"]), float(row[SIZE]), float(row[TOKENS]), float(row[metric]))
        for row in rows
        if row["state"] == "complete"
    ]


def fit_law(points: Sequence[Point], seed: int = 0) -> Law:
    """Returns the law fitted to the points.

    Args:
        seed: seed of the resampling, which draws groups, and then runs within each group.

    Raises:
        ValueError: fewer than three sizes, three numbers of tokens or eight groups, because five numbers are fitted.
    """
    groups = list(dict.fromkeys(point.group for point in points))
    if not _is_enough(points):
        raise ValueError(
            f"a scaling law needs runs of at least 3 sizes, 3 numbers of tokens and 8 variants; there are "
            f"{len({point.size for point in points})}, {len({point.tokens for point in points})} and {len(groups)}"
        )
    best = min((_fit(points, start) for start in _starts(points)), key=lambda found: found[1])[0]
    by_group = {group: [point for point in points if point.group == group] for group in groups}
    generator = np.random.default_rng(seed)
    resampled: list[NDArray[np.float64]] = []
    while len(resampled) < RESAMPLES:
        drawn = [
            by_group[groups[group]][one]
            for group in generator.integers(len(groups), size=len(groups))
            for one in generator.integers(len(by_group[groups[group]]), size=len(by_group[groups[group]]))
        ]
        if _is_enough(drawn, groups=5):
            resampled.append(_fit(drawn, best)[0])
    residuals = [np.log(point.loss / _loss(best, point.size, point.tokens)) for point in points]
    return Law(best, np.array(resampled), float(np.sqrt(np.mean(np.square(residuals)))), len(groups))


def _is_enough(points: Sequence[Point], groups: int = 8) -> bool:
    return (
        len({point.size for point in points}) >= 3
        and len({point.tokens for point in points}) >= 3
        and len({point.group for point in points}) >= groups
    )


def _starts(points: Sequence[Point]) -> list[NDArray[np.float64]]:
    """Returns several starting points, because the sum of squares has more than one minimum."""
    lowest = min(point.loss for point in points)
    size = np.exp(np.mean([np.log(point.size) for point in points]))
    tokens = np.exp(np.mean([np.log(point.tokens) for point in points]))
    return [
        np.array(
            [
                share * lowest,
                (1 - share) / 2 * lowest * size**power,
                power,
                (1 - share) / 2 * lowest * tokens**power,
                power,
            ]
        )
        for share in (0.2, 0.5, 0.8)
        for power in (0.1, 0.3, 0.6)
    ]


def _fit(points: Sequence[Point], start: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Returns the parameters and the remaining loss of the fit."""
    from scipy.optimize import least_squares

    size = np.array([point.size for point in points])
    tokens = np.array([point.tokens for point in points])
    logarithm = np.log([point.loss for point in points])
    # The unknowns are logarithms of the terms at the middle of the data, not at one parameter and one token. The
    # numbers to search are then of similar size.
    size_0, tokens_0 = np.exp(np.log(size).mean()), np.exp(np.log(tokens).mean())

    def unpack(x: NDArray[np.float64]) -> tuple[Any, ...]:
        return np.exp(x[0]), np.exp(x[1]) * size_0 ** x[2], x[2], np.exp(x[3]) * tokens_0 ** x[4], x[4]

    def residuals(x: NDArray[np.float64]) -> NDArray[np.float64]:
        found = np.log(_loss(unpack(x), size, tokens)) - logarithm
        return np.asarray(found, np.float64)

    E, A, alpha, B, beta = start
    tiny = 1e-6
    x = np.array(
        [
            np.log(max(E, tiny)),
            np.log(max(A * size_0**-alpha, tiny)),
            alpha,
            np.log(max(B * tokens_0**-beta, tiny)),
            beta,
        ]
    )
    lower, upper = [np.log(tiny) - 1, np.log(tiny) - 1, 0, np.log(tiny) - 1, 0], [5, 5, 3, 5, 3]
    x = np.clip(x, np.array(lower) + 1e-9, np.array(upper) - 1e-9)
    found = least_squares(residuals, x, bounds=(lower, upper), loss="huber", f_scale=HUBER)
    return np.array(unpack(found.x), np.float64), float(found.cost)


@dataclass(frozen=True)
class HeldOut:
    """The largest runs against the prediction of a law fitted without them.

    Args:
        group: the variant with the most compute.
        measured: its loss, a mean over seeds.
        predicted: its loss by the law fitted without it.
    """

    group: str
    measured: float
    predicted: Estimate


def predict_largest(points: Sequence[Point]) -> HeldOut | None:
    """Predicts the largest variant from the others. Returns None if the others are too few for a law."""
    largest = max(points, key=lambda point: point.size * point.tokens)
    ours = [point.loss for point in points if point.group == largest.group]
    others = [point for point in points if point.group != largest.group]
    if not _is_enough(others):
        return None
    law = fit_law(others)
    return HeldOut(largest.group, sum(ours) / len(ours), law.loss(largest.size, largest.tokens))


PAPER_RUNS = {"danube3-500m": 4.0e12, "danube3-4b": 6.0e12}
"""Preset → tokens of its pre-training (arXiv 2407.09276)."""


def law_lines(law: Law, held_out: HeldOut | None, points: Sequence[Point]) -> list[str]:
    """Returns lines with the law, its distance from the points and its predictions.

    It predicts the largest run, if one was held out, and the paper's models.
    """
    from lightning_danube.model import PRESETS

    known = law.coefficients()
    shown = ", ".join(f"{name} {_shown(one)}" for name, one in known.items())
    lines = [f"L = E + A·N^−alpha + B·D^−beta: {shown}; off by {law.error:.2%} on average"]
    lines.append(f"the largest distances from a run: {error_text(law, points)}")
    if held_out is None:
        lines.append("too few runs to fit it without the largest: how well it predicts is not known")
    else:
        foretold = f"fitted without {held_out.group} it says {_shown(held_out.predicted)}"
        lines.append(f"{foretold}; measured: {held_out.measured:.4g}")
    for name, tokens in PAPER_RUNS.items():
        size = PRESETS[name].parameters_without_embedding
        lines.append(
            f"extrapolated to {name} at {tokens:.1e} tokens: {_shown(law.loss(size, tokens))} nats/token of this "
            "text; the interval takes the law for granted there"
        )
    return lines


def error_text(law: Law, points: Sequence[Point]) -> str:
    """Returns the law's largest errors at the fewest and at the most tokens, in words."""
    errors = law.errors(points)
    fewest, most = min(errors), max(errors)
    return f"{errors[fewest]:.2f} nats/token at {fewest:,.0f} tokens, {errors[most]:.2f} at {most:,.0f}"


def _shown(one: Estimate) -> str:
    return f"{one.value:.4g} [{one.low:.3g}, {one.high:.3g}]"
