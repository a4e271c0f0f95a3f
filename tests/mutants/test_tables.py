"""The tables of mutants: each bug can be planted, and its tests exist. One of them is fast."""

import ast
import functools
import importlib.util
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def runner() -> Any:
    spec = importlib.util.spec_from_file_location("mutants_run", Path(__file__).parent / "run.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)

    sys.modules["mutants_run"] = module
    spec.loader.exec_module(module)
    return module


RUN = runner()
MUTANTS = RUN.mutants()


@pytest.mark.medium
@pytest.mark.parametrize("room", sorted({one.room for one in MUTANTS}))
def test_mutants_fit_the_code(room: str) -> None:
    wrong = [f"{one.name}: {fault}" for one in MUTANTS if one.room == room and (fault := fault_of(one))]
    assert not wrong


def fault_of(one: Any) -> str | None:
    """Returns why a mutant cannot be planted, None if it can."""
    try:
        mutated = one.mutated
        if one.file.endswith(".py"):
            compile(mutated, one.file, "exec")
    except (ValueError, SyntaxError) as error:
        return str(error)
    if one.find.strip() == one.replace.strip():
        return "it changes nothing"
    for test in one.tests:
        path, _, name = test.partition("::")
        if name and f"def {name.partition('[')[0]}(" not in (ROOT / path).read_text(encoding="utf-8"):
            return f"there is no {test}"
    return None if any(map(has_a_fast_test, one.tests)) else f"only slower tests see it: {', '.join(one.tests)}"


def markers_of_slower_tests() -> set[str]:
    """Returns the markers that `make test` leaves out."""
    options = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["pytest"]["ini_options"]["addopts"]
    return set(options[options.index("-m") + 1].replace("not ", "").split(" and "))


SLOWER = markers_of_slower_tests()


@functools.cache
def fast_tests(path: str) -> frozenset[str]:
    """Returns the names of a file's tests that no marker makes slower."""

    def is_slower(marks: str) -> bool:
        return any(f"pytest.mark.{marker}" in marks.replace("(", " ").split() for marker in SLOWER)

    tree = ast.parse((ROOT / path).read_text("utf-8"))
    of_file = [
        ast.unparse(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    if any(is_slower(marks.strip("[]").replace(",", " ")) for marks in of_file):
        return frozenset()
    return frozenset(
        node.name
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and not any(is_slower(ast.unparse(mark)) for mark in node.decorator_list)
    )


def has_a_fast_test(test: str) -> bool:
    path, _, name = test.partition("::")
    if (ROOT / path).is_dir():
        return any(fast_tests(str(file.relative_to(ROOT))) for file in (ROOT / path).rglob("test_*.py"))
    return name.partition("[")[0] in fast_tests(path) if name else bool(fast_tests(path))


def test_a_marked_test_is_no_fast_one() -> None:
    assert {"medium", "slow", "faults"} < SLOWER
    assert not fast_tests("tests/cli/test_other_user.py")
    assert "test_a_marked_test_is_no_fast_one" in fast_tests("tests/mutants/test_tables.py")
    assert "test_document_masks_reach_the_model" not in fast_tests("tests/pretraining/test_run.py")
    assert "test_the_loss_curve_is_the_golden_one" in fast_tests("tests/pretraining/test_run.py")


def test_names_of_mutants_are_unique() -> None:
    names = [(one.room, one.name) for one in MUTANTS]
    assert len(names) == len(set(names))


def test_a_mutant_that_stands_twice_is_refused() -> None:
    one = RUN.Mutant("room", "name", "lightning_danube/intervals.py", "return", "yield", ("tests/test_intervals.py",))
    with pytest.raises(ValueError, match=r"room: name: 'return' stands \d+ times in lightning_danube/intervals.py"):
        _ = one.mutated
