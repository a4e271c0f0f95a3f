"""The parts of the long check hold every slow test and every table of mutants, and each gets its turn."""

import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("ci_parts", ROOT / ".ci" / "parts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RECORD", tmp_path / "record.md")
    return module


def words_of(parts: Any, verb: str) -> list[str]:
    """Arguments of all commands of this make target."""
    commands = [command for command in parts.PARTS.values() if verb in command]
    return [word for command in commands for word in command[-1].removeprefix("ARGS=").split()]


def test_every_slow_test_is_in_one_part(parts: Any) -> None:
    slow = re.compile(r"^@pytest\.mark\.slow|marks=pytest\.mark\.slow|^pytestmark = .*slow", re.MULTILINE)
    files = [path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py") if slow.search(path.read_text())]
    assert len(files) > 20
    folders = [Path(word) for word in words_of(parts, "test-slow")]
    for file in files:
        assert sum(file == folder or folder in file.parents for folder in folders) == 1, file
    assert all((ROOT / folder).exists() for folder in folders)


def test_every_table_of_mutants_is_in_one_part(parts: Any) -> None:
    tables = [word for word in words_of(parts, "mutants") if not word.startswith("-")]
    assert sorted(tables) == sorted(path.stem for path in (ROOT / "tests" / "mutants").glob("*.yaml"))


def test_every_part_has_a_row_in_the_record(parts: Any) -> None:
    lines = (ROOT / ".ci" / "record.md").read_text("utf-8").splitlines()
    assert [line.split()[1] for line in lines if line.startswith("| ")][1:] == list(parts.PARTS)


def test_a_run_is_recorded_with_its_end(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        parts, "PARTS", {"good": [sys.executable, "-c", ""], "bad": [sys.executable, "-c", "raise SystemExit(3)"]}
    )
    assert parts.run("good") and not parts.run("bad")
    record = parts.record()
    assert record["good"][-1] == "passed" and record["bad"][-1] == "failed, exit code 3"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", record["good"][0])


def test_a_part_that_takes_too_long_is_stopped_with_all_it_started(
    parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    monkeypatch.setattr(parts, "PARTS", {"long": ["sh", "-c", f"sleep 60 & echo $! > {pid}; wait"]})
    monkeypatch.setattr(parts, "TIME_LIMIT", 0.3)
    assert not parts.run("long")
    assert parts.record()["long"][-1].startswith("stopped after")
    with pytest.raises(ProcessLookupError):
        while True:  # until the system has taken it away
            os.kill(int(pid.read_text()), 0)


@pytest.mark.parametrize("never", [[], ["| {} | never |  |  |  |  |"]])
def test_the_turn_goes_round(never: list[str], parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part that waited longest is first, and each commit since the record takes the next."""
    names = list(parts.PARTS)
    row = "| {} | 2026-01-{:02d} 10:00 | abc | a processor | 1.0 | passed |"
    rows = [row.format(name, day) for day, name in enumerate(reversed(names[1:]), 1)]
    rows += [line.format(names[0]) for line in never]
    parts.RECORD.write_text(parts.HEADER + "\n".join(rows) + "\n")
    expected = [names[0], *reversed(names[1:])]
    for commits in range(2 * len(names)):
        monkeypatch.setattr(parts, "git", lambda *_, commits=commits: str(commits))
        assert parts.turn() == expected[commits % len(names)]
