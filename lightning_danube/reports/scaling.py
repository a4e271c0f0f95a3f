"""A ladder of runs (models of growing size) and the scaling law fitted to it, as frames and figures."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lightning_danube.model import PRESETS
from lightning_danube.reports.figures import INK, legend, new_figure
from lightning_danube.reports.runs import MissingResult
from lightning_danube.reports.studies import MARKS, read_study, study_command
from lightning_danube.studies.scaling import (
    PAPER_RUNS,
    SIZE,
    TOKENS,
    Law,
    Point,
    error_text,
    fit_law,
    points_of,
    predict_largest,
)


@cache
def read_ladder(runs: str, name: str, metric: str) -> tuple[pd.DataFrame, Law]:
    """Returns a study's complete runs and the law fitted to them, so that all figures share one fit.

    Raises:
        MissingResult: there are no complete runs, or too few for a law.
    """
    study = read_study(runs, name)
    try:
        return study, fit_law(points(study, metric))
    except ValueError as error:
        raise MissingResult(f"{error}: `{study_command(name)} --resume` continues {name}") from None


def points(study: pd.DataFrame, metric: str) -> list[Point]:
    """Returns the runs of a ladder."""
    return points_of(study.to_dict("records"), metric)


def ladder(study: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Returns a row per variant: size, tokens, compute (6·N·D), and mean loss over the seeds."""
    groups = study.groupby("variant", sort=False)
    frame = groups[[SIZE, TOKENS, metric]].mean()
    frame.insert(2, "FLOPs", 6 * frame[SIZE] * frame[TOKENS])
    return frame.assign(seeds=groups.size()).sort_values("FLOPs").rename_axis(None)


def coefficients(law: Law) -> pd.DataFrame:
    """Returns the coefficients of L = E + A·N^−alpha + B·D^−beta, with 95 % intervals."""
    return pd.DataFrame(
        {name: {"value": one.value, "low": one.low, "high": one.high} for name, one in law.coefficients().items()}
    ).T


def errors(study: pd.DataFrame, metric: str, law: Law) -> pd.DataFrame:
    """Returns for each number of training tokens the runs, and the law's largest and mean distance from them."""
    law_says = [law.loss(size, tokens).value for size, tokens in zip(study[SIZE], study[TOKENS], strict=True)]
    distance = study[[TOKENS]].assign(distance=(study[metric] - law_says).abs())
    groups = distance.groupby(TOKENS)["distance"]
    return pd.DataFrame({"runs": groups.size(), "largest, nats/token": groups.max(), "mean, nats/token": groups.mean()})


def extrapolations(law: Law, largest: list[Point]) -> pd.DataFrame:
    """Returns the law's predictions for the largest run here, fitted without it, and for the paper's two models."""
    rows: dict[str, dict[str, float | None]] = {}
    held_out = predict_largest(largest)
    if held_out is not None:
        rows[f"{held_out.group} (left out)"] = {
            "predicted": held_out.predicted.value,
            "low": held_out.predicted.low,
            "high": held_out.predicted.high,
            "measured": held_out.measured,
        }
    for name, tokens in PAPER_RUNS.items():
        one = law.loss(PRESETS[name].parameters_without_embedding, tokens)
        rows[f"{name}, {tokens:.0e} tokens"] = {"predicted": one.value, "low": one.low, "high": one.high}
    return pd.DataFrame.from_dict(rows, orient="index", columns=["predicted", "low", "high", "measured"])


def loss_by_compute(study: pd.DataFrame, metric: str, law: Law) -> Figure:
    """Draws each run's loss over its compute, with a colour and the law's line per size."""
    figure, (ax,) = new_figure(4.2)
    handles = []
    for place, (size, ours) in enumerate(study.groupby(SIZE)):
        colour = MARKS[place % len(MARKS)]
        flops = 6 * ours[SIZE] * ours[TOKENS]
        (dots,) = ax.plot(flops, ours[metric], "o", color=colour, ms=5, alpha=0.7, label=f"{size / 1e6:.1f}M")
        handles.append(dots)
        tokens = np.geomspace(ours[TOKENS].min() / 1.5, ours[TOKENS].max() * 1.5, 50)
        ax.plot(6 * size * tokens, [law.loss(size, one).value for one in tokens], color=colour, lw=1.2)
    ax.set_xscale("log")
    ax.set(xlabel="training compute, 6·N·D FLOPs", ylabel=f"{metric}, nats/token")
    off = error_text(law, points(study, metric))
    legend(figure, handles, f"Parameters without the input embedding. Lines: the fitted law,\noff by up to {off}")
    return figure


def far_away(study: pd.DataFrame, metric: str, law: Law) -> Figure:
    """Draws the law extrapolated to the paper's models, with its interval, far beyond the measured runs."""
    figure, (ax,) = new_figure(3.8)
    flops = 6 * study[SIZE] * study[TOKENS]
    ax.plot(flops, study[metric], "o", color=INK, ms=4, alpha=0.6)
    ax.annotate("measured here", (flops.max(), study[metric].min()), (8, 4), textcoords="offset points", fontsize=9)
    for place, (name, tokens) in enumerate(PAPER_RUNS.items()):
        size, colour = PRESETS[name].parameters_without_embedding, MARKS[place]
        many = np.geomspace(1e9, tokens, 40)
        found = [law.loss(size, one) for one in many]
        ax.plot(6 * size * many, [one.value for one in found], color=colour, lw=1.6, ls="--")
        ax.fill_between(
            6 * size * many, [one.ends[0] for one in found], [one.ends[1] for one in found], color=colour, alpha=0.2
        )
        last = found[-1]
        ax.annotate(
            f"{name}: {last:.2f}",
            (6 * size * tokens, last.value),
            (0, (-18, 10)[place]),
            textcoords="offset points",
            ha="right",
            color=colour,
            fontsize=9,
        )
    ax.set_xscale("log")
    ax.set(xlabel="training compute, 6·N·D FLOPs", ylabel=f"{metric}, nats/token")
    furthest = max(6 * PRESETS[name].parameters_without_embedding * tokens for name, tokens in PAPER_RUNS.items())
    factor = np.log10(furthest / flops.max())
    ax.set_title(f"Dashed: an extrapolation over {factor:.0f} orders of magnitude of compute", fontsize=10, loc="left")
    ax.margins(y=0.15)
    return figure


__all__ = [
    "coefficients",
    "errors",
    "extrapolations",
    "far_away",
    "fit_law",
    "ladder",
    "loss_by_compute",
    "points",
    "read_ladder",
]
