"""Tables and titles of a scaling law that was made by hand."""

import numpy as np
import pandas as pd
import pytest

from lightning_danube.model import PRESETS
from lightning_danube.reports import scaling
from lightning_danube.studies.scaling import SIZE, TOKENS, Law, Point

PARAMETERS = np.array([1.7, 400.0, 0.34, 410.0, 0.28])


@pytest.fixture
def law() -> Law:
    noise = np.exp(0.05 * np.random.default_rng(0).normal(size=(200, 5)))
    return Law(PARAMETERS, PARAMETERS * noise, 0.01, 12)


def test_coefficients_stand_between_their_ends(law: Law) -> None:
    found = scaling.coefficients(law)
    assert found["value"].tolist() == PARAMETERS.tolist()
    for place, name in enumerate(found.index):
        ends = np.quantile(law.resampled[:, place], [0.025, 0.975])
        assert found.loc[name, ["low", "high"]].tolist() == pytest.approx(ends.tolist()), name


def test_predictions_for_the_papers_models_have_their_intervals(law: Law) -> None:
    found = scaling.extrapolations(law, [Point("a", 1e6, 1e8, 4.0)])
    for row, (name, tokens) in zip(found.index, (("danube3-500m", 4e12), ("danube3-4b", 6e12)), strict=True):
        size = PRESETS[name].parameters - 32_000 * PRESETS[name].hidden_size
        losses = [E + A * size**-alpha + B * tokens**-beta for E, A, alpha, B, beta in [PARAMETERS, *law.resampled]]
        ends = np.quantile(losses[1:], [0.025, 0.975])
        assert found.loc[row, ["predicted", "low", "high"]].tolist() == pytest.approx([losses[0], *ends])
        assert row.startswith(name) and np.isnan(found.loc[row, "measured"])


def test_the_title_says_how_far_the_law_is_extrapolated(law: Law) -> None:
    study = pd.DataFrame({SIZE: [1e6, 1e7], TOKENS: [1e8, 1e9], "loss": [5.0, 4.0]})
    (ax,) = scaling.far_away(study, "loss", law).axes
    # From 6 × 1e7 × 1e9 FLOPs to 6 × 3.8e9 × 6e12, which is 2.3e6 times as much.
    assert "over 6 orders of magnitude" in ax.get_title(loc="left")
