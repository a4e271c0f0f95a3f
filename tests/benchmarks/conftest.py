"""What the tests of the benchmarks share."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def benchmarks_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.fixture
def report(benchmarks_on_path: None) -> Any:
    """Keeps what a step of a benchmark measures."""
    import steps

    return steps.Kept()
