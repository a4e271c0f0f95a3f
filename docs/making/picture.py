"""Draws the pictures of the pages from kept results, for light and for dark pages.

    python docs/making/picture.py

Each picture is a figure of the notebooks. A page shows it by `<picture>`, which takes the dark file on a dark ground.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import pandas as pd  # noqa: E402

from lightning_danube.reports import attention, figures, levels, paper, studies  # noqa: E402
from lightning_danube.reports.runs import read_run  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "pictures"
NO_RUNS = "no-runs"
"""A folder that does not exist: studies are read from the results that come with a clone."""


def orders() -> Figure:
    """Draws how the loss differs from that of a constant mix, by source, with confidence intervals."""
    sources = ["val_loss", *(f"val_loss.{name}" for name in ("web", "wiki", "academic", "synthetic", "instruct"))]
    return studies.forest(studies.read_study(NO_RUNS, "curriculum"), sources, "constant", "nats/token")


FIGURES: dict[str, Callable[[], Figure]] = {
    "quickstart": lambda: figures.losses_over_mix(read_run(RESULTS / "quickstart")),
    "frontier": lambda: levels.frontier(pd.read_parquet(RESULTS / "quantization-laptop-2026-11-25.parquet")),
    "key-value-heads": lambda: attention.speed(attention.read_speeds()),
    "mixes": lambda: studies.mixes("studies/curriculum"),
    "orders": orders,
    "academic": paper.academic_scores,
}
"""Name of a picture → what draws it."""


def draw(folder: Path) -> None:
    """Writes all pictures into a folder, light and dark. The same results give the same bytes."""
    settings: Any = {"svg.hashsalt": "quickstart", "svg.fonttype": "none", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        for name, make in FIGURES.items():
            for ground, figure in (("light", make()), ("dark", figures.in_dark(make()))):
                figure.savefig(folder / f"{name}-{ground}.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw(PICTURES)
