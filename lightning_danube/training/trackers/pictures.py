"""Pictures for TensorBoard that need no matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#E69F00", "#F0E442", "#444444", "#888888", "#bbbbbb")
"""Colours that colour-blind people can tell apart; the notebooks draw the paper's sources in the same ones."""
PAPER_SOURCES = ("web", "wiki", "academic", "synthetic", "instruct", "code", "social")
SIZE = (640, 300)
LEFT, TOP, RIGHT, BOTTOM = 54, 30, 500, 264
"""The frame of the stack, in pixels."""


class Column(NamedTuple):
    """A column of a stacked picture, as wide as its amount: name → amount of each part."""

    title: str
    parts: Mapping[str, int]


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """Returns name → colour: the same for the paper's sources in every run, and the free ones in order for others."""
    known = dict(zip(PAPER_SOURCES, COLOURS, strict=False))
    free = [colour for colour in COLOURS if colour not in [known.get(name) for name in names]]
    others = [name for name in names if name not in known]
    chosen = {name: free[place % len(free)] for place, name in enumerate(others)}
    return {name: known.get(name) or chosen[name] for name in names}


def stacked_picture(columns: Sequence[Column], unit: str) -> NDArray[Any]:
    """Returns a picture of shares that are stacked to 100 %, one column after the other, (height, width, 3).

    Args:
        columns: those without any amount are left out.
        unit: of the amounts, under the picture.
    """
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)
    columns = [column for column in columns if sum(column.parts.values())]
    total = sum(sum(column.parts.values()) for column in columns)
    names = list(dict.fromkeys(name for column in columns for name in column.parts))
    colours = colours_of(names)
    begun, seen = 0, set()
    for column in columns:
        amount = sum(column.parts.values())
        left, right = (LEFT + (RIGHT - LEFT) * place / total for place in (begun, begun + amount))
        height = float(BOTTOM)
        for name, part in column.parts.items():
            top = height - (BOTTOM - TOP) * part / amount
            if part:
                seen.add(name)
                draw.rectangle((left, top, right, height), fill=colours[name])
            if height - top > 18 and right - left > 60:
                text = f"{100 * part / amount:.1f} %"
                draw.text(((left + right) / 2, (top + height) / 2), text, "white", font, "mm", stroke_width=1,
                          stroke_fill="#333333")  # fmt: skip
            height = top
        draw.line((right, TOP, right, BOTTOM), fill="white", width=2)
        begun += amount
        if right - left > 80 or begun == total:  # else the texts would lie over each other
            draw.text((right, BOTTOM + 14), f"{begun:,}", "#222222", font, "rm")
        if right - left > 8 * len(column.title):
            draw.text(((left + right) / 2, TOP - 14), column.title, "#222222", font, "mm")
    draw.text((LEFT, BOTTOM + 14), f"0 {unit}", "#222222", font, "lm")
    for share in (0, 50, 100):
        draw.text((LEFT - 6, BOTTOM - (BOTTOM - TOP) * share / 100), f"{share} %", "#222222", font, "rm")
    for place, name in enumerate(name for name in reversed(names) if name in seen):
        draw.rectangle((RIGHT + 16, TOP + 24 * place, RIGHT + 32, TOP + 16 + 24 * place), fill=colours[name])
        draw.text((RIGHT + 40, TOP + 8 + 24 * place), name, "#222222", font, "lm")
    return np.asarray(picture)
