"""The stacked picture of a mix, read by its pixels."""

import numpy as np
import pytest
from PIL import ImageColor

from lightning_danube.training.trackers.pictures import BOTTOM, LEFT, RIGHT, TOP, Column, colours_of, stacked_picture


def test_areas_are_the_shares() -> None:
    columns = [Column("one", {"web": 600, "mine": 200}), Column("two", {"web": 0, "mine": 200}), Column("three", {})]
    picture = stacked_picture(columns, "tokens")[TOP:BOTTOM, LEFT:RIGHT]
    colours = colours_of(["web", "mine"])
    areas = {name: (picture == np.array(ImageColor.getrgb(colour))).all(-1).mean() for name, colour in colours.items()}
    # Texts and the lines between columns cover a part.
    assert areas == pytest.approx({"web": 0.6, "mine": 0.4}, abs=0.02)


def test_the_papers_sources_keep_their_colours() -> None:
    assert colours_of(["instruct", "web"]) == {"instruct": "#D55E00", "web": "#0072B2"}
    several = colours_of([f"source {n}" for n in range(10)])
    assert len(set(several.values())) == 10
    assert len(colours_of([f"source {n}" for n in range(30)])) == 30


def test_a_run_that_has_seen_nothing_has_an_empty_picture() -> None:
    assert stacked_picture([Column("one", {"web": 0})], "tokens").shape == (300, 640, 3)
