"""The tables of mutants: each bug can be planted, and its tests exist."""

import importlib.util
import sys
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
    return None


def test_names_of_mutants_are_unique() -> None:
    names = [(one.room, one.name) for one in MUTANTS]
    assert len(names) == len(set(names))


def test_a_mutant_that_stands_twice_is_refused() -> None:
    one = RUN.Mutant("room", "name", "lightning_danube/intervals.py", "return", "yield", ("tests/test_intervals.py",))
    with pytest.raises(ValueError, match=r"room: name: 'return' stands \d+ times in lightning_danube/intervals.py"):
        _ = one.mutated
