"""The lines for a terminal: what is learned is marked with and without colour."""

import io
import re

import pytest

from lightning_danube.inspection.lines import BARS, Style, bars, lines_of, token_lines, wants_colour
from lightning_danube.inspection.shown import ShownExample, ShownSource, ShownToken

PLAIN = Style(colour=False)


def example(*parts: str) -> ShownExample:
    """An example whose parts with a "+" are learned."""
    return ShownExample(
        "row 1", [ShownToken(0, part.lstrip("+"), part.startswith("+"), part == "</s>") for part in parts]
    )


def shown(**options: object) -> ShownSource:
    return ShownSource("talk", "conversations", "talk.jsonl", **options)  # type: ignore[arg-type]


def test_tokens_and_what_is_learned_are_marked_without_colour() -> None:
    (line,) = token_lines(example("What", " is", "+ a", "+ cat", "</s>", "+x"), 80, PLAIN)
    assert line.strip() == "What│ is⟦ a│ cat⟧</s>⟦x⟧"


def test_colour_adds_codes_only() -> None:
    one = example("What", " is", "+ a", "+ cat", "</s>")
    coloured = "\n".join(token_lines(one, 80, Style(colour=True)))
    assert "\x1b[1;32m" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == "\n".join(token_lines(one, 80, PLAIN))


def test_line_ends_and_other_controls_are_visible() -> None:
    lines = list(token_lines(example("a", "\n\n", "b\t", "", "\x1b[31m"), 80, PLAIN))
    assert lines == ["    a│⏎", "    ⏎", "    │b⇥│▪│\\x1b[31m"]


def test_lines_break_between_tokens() -> None:
    lines = list(token_lines(example(*[f"+word{n}" for n in range(40)]), 40, PLAIN))
    assert len(lines) > 5 and all(len(line) <= 40 for line in lines)
    assert "".join(line[4:] for line in lines) == "⟦" + "│".join(f"word{n}" for n in range(40)) + "⟧"


def test_a_gap_says_how_many_tokens_it_hides() -> None:
    text = "".join(token_lines(example(*["+x"] * 1000), 10_000, PLAIN))
    assert "[… 840 more …]" in text and text.count("⟦") == text.count("⟧") == 1


def test_a_source_with_nothing_to_learn_says_so_first() -> None:
    empty = shown(read=3, left_out={"no turns": 3}, places=["talk.jsonl, row 1: …"], complete=True)
    lines = list(lines_of(empty, 80, PLAIN))
    assert lines[1] == "  ✗ NOTHING IS LEARNED FROM THIS SOURCE"
    assert "    3  no turns" in lines and "      talk.jsonl, row 1: …" in lines
    assert "\x1b[1;31m" in list(lines_of(empty, 80, Style(colour=True)))[1]


def test_lengths_are_drawn_only_where_they_differ() -> None:
    drawn = "\n".join(lines_of(shown(read=2, kept=2, lengths=[2, 9], tokens=11, marked_tokens=3), 80, PLAIN))
    assert re.search(r"^  2 █ +█ 9$", drawn, re.MULTILINE)
    same = "\n".join(lines_of(shown(read=2, kept=2, lengths=[9, 9], tokens=18, marked_tokens=3), 80, PLAIN))
    assert "█" not in same


def test_a_small_count_is_visible() -> None:
    assert bars([0, 1, 5000]) == f" {BARS[1]}█"


@pytest.mark.parametrize(
    ("variables", "terminal", "wanted"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_who_gets_colours(
    variables: dict[str, str], terminal: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert wants_colour(stream) is wanted
