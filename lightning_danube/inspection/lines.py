"""Writes what `inspect` shows of the data as lines for a terminal, in colour or in plain text."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from typing import TextIO

from lightning_danube.inspection.shown import (
    ShownExample,
    ShownSource,
    ShownToken,
    histogram,
    nothing_seen,
    sentences_about,
    shortened,
)
from lightning_danube.outside.texts import printable

HEAD, TAIL = 120, 40
"""Tokens at the beginning and at the end of a stretch that are written."""
LEGEND = "│ between two tokens, ⟦ ⟧ around what is learned or measured, ⏎ line end, ▪ part of a character"
BARS = " ▁▂▃▄▅▆▇█"
_COLUMNS = 40
_INDENT = "    "
_STYLES = {"marked": "1;32", "special": "35", "plain": "0", "edge": "2", "head": "1", "warning": "1;31"}


class Style:
    """Puts colours around texts, or leaves the texts as they are."""

    def __init__(self, colour: bool) -> None:
        self.colour = colour

    def __call__(self, text: str, *names: str) -> str:
        text, codes = printable(text), ";".join(_STYLES[name] for name in names)
        return f"\x1b[{codes}m{text}\x1b[0m" if self.colour and text else text


def wants_colour(stream: TextIO) -> bool:
    """Returns whether a stream is a terminal that shows colours. NO_COLOR, if set, forbids them (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def lines_of(shown: ShownSource, width: int, style: Style) -> Iterator[str]:
    """Yields the lines about a source, none longer than `width` if its words allow."""
    place = f"  {shown.place}" if shown.place else ""
    yield style(f"── {shown.name}", "head") + style(place, "edge")
    if shown.is_empty:
        yield "  " + style(f"✗ {nothing_seen(shown)}", "warning")
    for warning in shown.warnings:
        yield "  " + style(f"✗ {warning}", "warning")
    for fact in sentences_about(shown):
        yield printable(f"  {fact}")
    if len(shown.lengths) > 1 and min(shown.lengths) < max(shown.lengths):
        yield f"  {min(shown.lengths):,} {bars(histogram(shown.lengths, _COLUMNS))} {max(shown.lengths):,}"
    if shown.left_out:
        yield "  left out:"
        digits = max(len(f"{count:,}") for count in shown.left_out.values())
        for cause, count in shown.left_out.items():
            yield printable(f"    {count:>{digits},}  {cause}")
        for place in shown.places:
            yield printable(f"      {place}")
    for example in shown.examples:
        yield ""
        yield "  " + style(headline(example, shown.marks), "head")
        for note in example.notes:
            yield printable(f"  {note}")
        yield from token_lines(example, width, style)


def headline(example: ShownExample, marks: str | None) -> str:
    marked = f", {example.marked:,} {marks}" if marks is not None else ""
    return f"{example.title} ({len(example.tokens):,} tokens{marked})"


def bars(counts: list[int]) -> str:
    """Returns counts as a row of bars. A count above 0 is always visible."""
    most = max(counts)
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in counts)


def visible(text: str) -> str:
    """Returns a token's text with its control characters made visible; a line end stays and has a mark."""
    if not text:
        return "▪"
    return printable(text.replace("\n", "⏎\n").replace("\t", "⇥").replace("\r", "␍"))


def token_lines(example: ShownExample, width: int, style: Style) -> Iterator[str]:
    """Yields the tokens of an example as lines that break between tokens."""
    line, used, room = "", 0, max(20, width - len(_INDENT))
    for text, names in _pieces(example):
        for number, part in enumerate(text.split("\n")):
            cells = _cells(part)
            if number or used + cells > room:
                yield (_INDENT + line).rstrip()
                line, used = "", 0
            line += style(part, *names)
            used += cells
    if used:
        yield (_INDENT + line).rstrip()


def _pieces(example: ShownExample) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields the texts to write, each with its styles: tokens, edges between tokens, and marks."""
    inside = first = False
    edge = ("edge",)
    for token in shortened(example.tokens, HEAD, TAIL):
        marked = inside if isinstance(token, int) else token.marked
        if inside and not marked:
            yield "⟧", ("marked",)
        elif first and marked == inside:
            yield "│", edge
        if marked and not inside:
            yield "⟦", ("marked",)
        inside, first = marked, True
        yield (f"[… {token:,} more …]", edge) if isinstance(token, int) else _token(token)
    if inside:
        yield "⟧", ("marked",)


def _token(token: ShownToken) -> tuple[str, tuple[str, ...]]:
    kind = "marked" if token.marked else "special" if token.special else "plain"
    return visible(token.text), (kind, "special") if token.marked and token.special else (kind,)


def _cells(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
