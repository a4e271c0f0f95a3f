"""Draws the picture of the README from the kept run of the quickstart, for light and for dark pages.

python docs/making/picture.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lightning_danube.reports.figures import in_dark, losses_over_mix  # noqa: E402
from lightning_danube.reports.runs import read_run  # noqa: E402

RUN = ROOT / "benchmarks" / "results" / "quickstart"
PICTURES = ROOT / "docs" / "pictures"


def draw(folder: Path) -> None:
    """Writes both pictures into a folder. The same run gives the same bytes."""
    run = read_run(RUN)
    with matplotlib.rc_context({"svg.hashsalt": "quickstart", "svg.fonttype": "none", "font.family": "sans-serif"}):
        for name, figure in (("light", losses_over_mix(run)), ("dark", in_dark(losses_over_mix(run)))):
            figure.savefig(folder / f"quickstart-{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw(PICTURES)
