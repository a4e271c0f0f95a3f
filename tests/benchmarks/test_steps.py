"""Steps in separate processes: their limits, what is kept of them, and the tables."""

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = f"""
import sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
from pathlib import Path
from steps import Process, Step, child

def good(report, options):
    report(speed=options["speed"])
    report.row(kernel="a | b", ms=1.5)

def bad(report, options):
    report(before=1)
    raise ValueError("no such thing")

def slow(report, options):
    inner = Process(Path(__file__), Path(__file__).with_suffix(".log"), {{}})
    inner.begin({{"step": "inner", "options": {{}}}})
    report(pid=inner._process.pid)
    time.sleep(60)

STEPS = [Step("good", 1, good, "works"), Step("bad", 1, bad, "fails"), Step("slow", 1, slow, "hangs"),
         Step("last", 1, good, "works after that"), Step("inner", 1, lambda report, options: time.sleep(60), "")]
if __name__ == "__main__":
    sys.exit(child(STEPS, ["no_module_of_that_name"]))
"""


@pytest.fixture
def steps(benchmarks_on_path: None) -> Any:
    import steps

    return steps


@pytest.mark.medium
def test_each_step_keeps_what_it_measured_and_the_next_one_runs(steps: Any, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    names: dict[str, Any] = {}
    exec(SCRIPT, names)
    records = steps.run_steps(
        names["STEPS"][:4],
        tmp_path / "out",
        "some",
        script=script,
        seconds=20.0,
        slack=3.0,
        options={"speed": 7},
        environment={},
        about={"commit": "abc"},
    )
    assert [record["ok"] for record in records] == [True, False, False, True]
    assert [record["ended"] for record in records] == ["done", "exit code 1", "at its limit", "done"]
    assert records[0]["measured"] == {"speed": 7, "rows": [{"kernel": "a | b", "ms": 1.5}]}
    assert records[1]["measured"] == {"before": 1, "error": "ValueError: no such thing"}
    assert "Traceback" in records[1]["tail"] and not lives(records[2]["measured"]["pid"])
    lines = [json.loads(line) for line in (tmp_path / "out" / "some.jsonl").read_text().splitlines()]
    assert lines == [{"about": {"commit": "abc"}}, *records]
    page = (tmp_path / "out" / "some.md").read_text()
    assert "| bad | fails |" in page and "| at its limit |" in page and "| a / b | 1.5 |" in page
    assert "ValueError: no such thing" in (tmp_path / "out" / "some.log").read_text()


def lives(pid: int) -> bool:
    """Whether a process is there, and is no zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_limits_shrink_with_what_is_left(steps: Any) -> None:
    def step(seconds: float) -> Any:
        return steps.Step("", seconds, lambda report, options: None, "")

    plan = [step(20), step(60), step(20)]
    # Enough is left: a step may take a quarter longer than planned.
    assert steps.limit_of(0, plan, 200) == 25
    assert steps.limit_of(1, plan, 200) == 75
    # Half is left of what the last two need: shares of 30 and 10 seconds, and a quarter more.
    assert steps.limit_of(1, plan, 40) == 37.5
    assert steps.limit_of(2, plan, 10) == 10
    assert steps.limit_of(2, plan, -3) == 0


def test_the_limits_of_all_steps_stay_within_the_whole_time(steps: Any) -> None:
    import first_contact

    left = first_contact.SECONDS
    assert len(first_contact.STEPS) == 9
    for number in range(len(first_contact.STEPS)):
        limit = steps.limit_of(number, first_contact.STEPS, left)
        assert limit > 10
        left -= limit
        assert left >= -1e-9


def test_the_table_names_the_steps_that_did_not_begin(steps: Any) -> None:
    plan = [steps.Step(name, 1, lambda report, options: None, f"proves {name}") for name in ("one", "two")]
    record = {"step": "one", "seconds": 1.0, "limit": 2.0, "ok": True, "ended": "done", "measured": {"speed": 12345.6}}
    page = steps.table_of([record], plan, {"commit": "abc"})
    assert "commit: abc" in page
    assert "| one | proves one | 1 of 2 | ok | speed 12,346 |" in page
    assert "| two | proves two |  | not begun |  |" in page


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.1235"), (98765.4, "98,765"), (True, "yes"), (None, "–"), ({"a": 1.0, "b": [2, "x"]}, "a 1, b 2, x")],
)
def test_values_are_short(steps: Any, value: Any, text: str) -> None:
    assert steps.shown(value) == text


def test_rows_are_reported_one_by_one(steps: Any) -> None:
    report = steps.Kept()
    report(a=1)
    report.row(b=2)
    report.row(b=3)
    assert report.measured == {"a": 1, "rows": [{"b": 2}, {"b": 3}]}
    with pytest.raises(AssertionError, match="one by one"):
        report(rows=4)


def test_a_process_that_nobody_needs_ends(steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert steps.child([], []) == 0
