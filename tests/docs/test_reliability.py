"""The table of faults names a test for each, and each named test exists."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS.parent / "docs" / "reliability.md"
LEAST_ROWS = 130
REFERENCE = re.compile(r"`((?:\w+/)*\w+\.py)(?:::(test_\w+))?`")


def rows() -> Iterator[list[str]]:
    for line in PAGE.read_text("utf-8").splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 4 and cells[0] != "fault" and set(cells[0]) != {"-"}:
            yield cells


@cache
def names_of(file: Path) -> set[str]:
    return set(re.findall(r"^ *def (test_\w+)\(", file.read_text("utf-8"), re.MULTILINE))


def test_each_test_that_a_row_names_exists() -> None:
    assert len(list(rows())) >= LEAST_ROWS
    for fault, *_, cell in rows():
        named = REFERENCE.findall(cell)
        assert named or cell.startswith("the same") or cell == "–", f"{fault}: names no test: {cell}"
        assert cell.count("`") == 2 * len(named), f"{fault}: {cell}"
        for path, name in named:
            assert (TESTS / path).is_file(), f"{fault}: there is no tests/{path}"
            assert not name or name in names_of(TESTS / path), f"{fault}: tests/{path} has no {name}"
