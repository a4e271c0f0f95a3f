"""Callbacks are short, and know nothing of each other. Read from the source."""

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 65


@functools.cache
def trees(*folders: str) -> dict[str, ast.Module]:
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert files, "no Python file found: the rules check nothing"
    return {file.relative_to(ROOT).as_posix(): ast.parse(file.read_text("utf-8")) for file in files}


def lines_of_classes(tree: ast.Module) -> dict[str, int]:
    """Returns class → number of its lines, with decorators and docstring."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert node.end_lineno is not None
            found[node.name] = node.end_lineno - first + 1
    return found


def reads_callbacks(tree: ast.Module) -> list[int]:
    """Returns the lines that read `trainer.callbacks` or, in any way, an attribute `callbacks` of a trainer."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "callbacks"
        and ast.unparse(node.value).split(".")[-1].removeprefix("_") == "trainer"
    ]


def test_no_callback_is_long() -> None:
    long = {
        f"{path}: {name}": lines
        for path, tree in trees("callbacks").items()
        for name, lines in lines_of_classes(tree).items()
        if lines > MOST_LINES
    }
    assert not long, f"at most {MOST_LINES} lines: what a callback computes belongs into the task's room: {long}"


def test_nobody_searches_the_callbacks_of_a_trainer() -> None:
    found = {
        path: lines for path, tree in trees("callbacks", "lightning_danube").items() if (lines := reads_callbacks(tree))
    }
    assert not found, f"read task.run_facts instead: {found}"


def test_no_callback_imports_another() -> None:
    """They share only what prints a line, and the base of the summaries."""
    shared = {"lightning_danube.callbacks.progress", "lightning_danube.callbacks.summaries.run"}
    found = [
        f"{path}: {node.module}"
        for path, tree in trees("callbacks").items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and str(node.module).startswith("lightning_danube.callbacks.")
        and node.module not in shared
        and not path.endswith("__init__.py")
    ]
    assert not found


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("next(c for c in trainer.callbacks if c)", [1]),
        ("def f(self):\n    return self.trainer.callbacks", [2]),
        ("self._trainer.callbacks", [1]),
        ("from lightning_danube.callbacks import progress", []),
        ('print("name it in trainer.callbacks")', []),
    ],
)
def test_a_search_is_found(source: str, lines: list[int]) -> None:
    assert reads_callbacks(ast.parse(source)) == lines


def test_decorators_and_docstrings_count() -> None:
    assert lines_of_classes(ast.parse('@one\n@two\nclass A:\n    """B."""\n\n    x = 1\n')) == {"A": 6}
