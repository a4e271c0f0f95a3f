"""Runs measurements one after the other, each in a separate process with its own time limit.

A step is a function that reports what it has measured as soon as it knows it. So a step that fails, hangs or comes to
its limit keeps what it reported before, and the next step begins. Each step becomes a line of a JSON file, and a row of
a Markdown table that is written again after each step: if the whole program is cut off, both files are there.

The process of a step is started while the step before it runs. It imports the libraries and waits. So the imports take
no time of the step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "measured: "
"""Begins a line on standard output that holds what a step has measured, in JSON."""
INSIDE = "LIGHTNING_DANUBE_STEP"
"""The environment variable that the processes of steps have."""
SLACK = 1.25
"""How much longer than planned a step may take."""
LONGEST_CELL = 400
"""Characters of what a step has measured, in the table of all steps. The sections below have the rest."""


class Report:
    """What a step calls with its results. `report(name=value)` keeps a value, `report.row(name=value)` a table row."""

    def __call__(self, **values: Any) -> None:
        assert "rows" not in values, "rows are reported one by one"
        self._say({"values": values})

    def row(self, **cells: Any) -> None:
        self._say({"row": cells})

    def _say(self, content: dict[str, Any]) -> None:
        print(f"\n{MARK}{json.dumps(content)}", flush=True)


class Kept(Report):
    """A report that keeps everything, for tests and for steps that read what another function reports."""

    def __init__(self) -> None:
        self.measured: dict[str, Any] = {}

    def _say(self, content: dict[str, Any]) -> None:
        merge(self.measured, json.loads(json.dumps(content)))


def merge(measured: dict[str, Any], content: Mapping[str, Any]) -> None:
    """Adds one report to all that a step has measured."""
    measured.update(content.get("values", {}))
    if "row" in content:
        measured.setdefault("rows", []).append(content["row"])


@dataclasses.dataclass(frozen=True)
class Step:
    """
    Args:
        name: of the function in `run`, as the tables show it.
        seconds: how long it should take.
        run: called in the step's own process with a report and the options of `run_steps`.
        proves: what its result tells.
        libraries: what its process imports while it waits, beside PyTorch.
    """

    name: str
    seconds: float
    run: Callable[[Report, dict[str, Any]], None]
    proves: str
    libraries: tuple[str, ...] = ()


class Process:
    """A process that has imported the libraries, and waits for its work.

    Args:
        script: called with `--child`; it calls `child`.
        log: gets all that the process prints.
        libraries: what it imports, beside PyTorch.
    """

    def __init__(self, script: Path, log: Path, environment: Mapping[str, str], libraries: Sequence[str] = ()) -> None:
        self._log = log
        # One that a step starts stays in the step's session, and ends with it.
        self._leads = INSIDE not in os.environ
        self._has_ended = False
        self.measured: dict[str, Any] = {}
        self.tail = ""
        self._process = subprocess.Popen(
            [sys.executable, str(script), "--child", "torch", *libraries],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1", INSIDE: "1", **environment},
            start_new_session=self._leads,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(MARK):
                merge(self.measured, json.loads(line.removeprefix(MARK)))
                continue
            with self._log.open("a", encoding="utf-8") as file:
                file.write(line)
            if line.strip():
                self.tail = (self.tail + line)[-3000:]

    def begin(self, work: Mapping[str, Any]) -> None:
        """Tells the process what to do: {"step": …} or {"command": arguments of `lightning_danube`}."""
        assert self._process.stdin is not None
        # If the process has ended already, its exit code says so.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(work) + "\n")
            self._process.stdin.flush()

    def wait(self, seconds: float) -> int | None:
        """Returns the exit code, and None if the process was ended at its limit."""
        try:
            code: int | None = self._process.wait(max(0.0, seconds))
        except subprocess.TimeoutExpired:
            code = None
        self.end()
        return code

    def end(self) -> None:
        """Ends the process and what it has started."""
        if self._has_ended:
            return
        self._has_ended = True
        with contextlib.suppress(ProcessLookupError):
            if self._leads:
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._reader.join(2)


def child(steps: Sequence[Step], libraries: Sequence[str]) -> int:
    """The other side of `Process`: imports, waits, and does the work. Returns the exit code."""
    for library in libraries:
        # The step that needs what is missing reports it.
        with contextlib.suppress(Exception):
            __import__(library)
    line = sys.stdin.readline()
    if not line.strip():  # nobody needs this process any more
        return 0
    work = json.loads(line)
    if "command" in work:
        from lightning_danube.__main__ import main

        sys.argv = ["lightning_danube", *work["command"]]
        return main()
    (step,) = (step for step in steps if step.name == work["step"])
    try:
        step.run(Report(), work["options"])
    except Exception as error:
        traceback.print_exc()
        Report()(error=f"{type(error).__name__}: {error}"[:1000])
        return 1
    return 0


def limit_of(number: int, steps: Sequence[Step], left: float, slack: float = SLACK) -> float:
    """Returns the seconds that a step may take.

    They are its own with some slack, if as much is left. A step may also use up to so much more than its share of what
    is left, and the last one all of it.
    """
    own = steps[number].seconds
    share = left * own / sum(step.seconds for step in steps[number:])
    return max(0.0, min(slack * own, slack * share, left))


def run_steps(
    steps: Sequence[Step],
    out: Path,
    name: str,
    *,
    script: Path,
    seconds: float,
    options: Mapping[str, Any],
    environment: Mapping[str, str],
    about: Mapping[str, Any],
    slack: float = SLACK,
) -> list[dict[str, Any]]:
    """Runs the steps, writes `<name>.jsonl`, `<name>.md` and `<name>.log`, and returns a record for each step.

    Args:
        seconds: for all steps together. The limits of the steps that are left shrink with what is left.
        about: what was measured where, for the first line of the file and the head of the table.
        slack: how many times longer than planned a step may take.
    """
    out.mkdir(parents=True, exist_ok=True)
    log = out / f"{name}.log"
    log.unlink(missing_ok=True)
    records: list[dict[str, Any]] = []
    began = time.monotonic()
    with (out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
        _write_line(file, {"about": dict(about)})
        waiting: Process | None = Process(script, log, environment, steps[0].libraries)
        process: Process | None = None
        try:
            for number, step in enumerate(steps):
                process = waiting
                assert process is not None
                after = steps[number + 1 : number + 2]
                waiting = Process(script, log, environment, after[0].libraries) if after else None
                limit = limit_of(number, steps, seconds - (time.monotonic() - began), slack)
                with log.open("a", encoding="utf-8") as lines:
                    lines.write(f"\n== {step.name}, at most {limit:.0f} s\n")
                start = time.monotonic()
                process.begin({"step": step.name, "options": dict(options)})
                code = process.wait(limit)
                record: dict[str, Any] = {
                    "step": step.name,
                    "seconds": round(time.monotonic() - start, 1),
                    "limit": round(limit, 1),
                    "ok": code == 0 and "error" not in process.measured,
                    "ended": "done" if code == 0 else "at its limit" if code is None else f"exit code {code}",
                    "measured": process.measured,
                }
                if not record["ok"]:
                    record["tail"] = process.tail
                records.append(record)
                _write_line(file, record)
                (out / f"{name}.md").write_text(table_of(records, steps, about), encoding="utf-8")
                print(
                    f"{step.name}: {record['ended']} in {record['seconds']:.0f} s; {brief(record['measured'])}",
                    flush=True,
                )
        finally:
            # Also after Ctrl-C: the processes are in sessions of their own.
            for one in (process, waiting):
                if one is not None:
                    one.end()
    return records


def _write_line(file: Any, content: Mapping[str, Any]) -> None:
    file.write(json.dumps(content) + "\n")
    file.flush()
    os.fsync(file.fileno())


def table_of(records: Sequence[Mapping[str, Any]], steps: Sequence[Step], about: Mapping[str, Any]) -> str:
    """Returns a page: what was measured where, a row for each step, then the rows that each step has reported."""
    from lightning_danube.terminal import markdown_table

    proves = {step.name: step.proves for step in steps}
    rows = [
        [
            record["step"],
            proves[record["step"]],
            f"{record['seconds']:.0f} of {record['limit']:.0f}",
            "ok" if record["ok"] else record["ended"],
            _cell(brief(record["measured"])),
        ]
        for record in records
    ]
    rows += [[step.name, step.proves, "", "not begun", ""] for step in steps[len(records) :]]
    lines = [
        *(f"{key}: {value}  " for key, value in about.items()),
        "",
        markdown_table(["step", "proves", "s", "ended", "measured"], rows),
    ]
    for record in records:
        if found := record["measured"].get("rows"):
            columns = list(dict.fromkeys(column for row in found for column in row))
            cells = [[_cell(shown(row.get(column, ""))) for column in columns] for row in found]
            lines += ["", f"**{record['step']}**", "", markdown_table(columns, cells)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def brief(measured: Mapping[str, Any]) -> str:
    """Returns what a step has measured, without its rows, on one line."""
    parts = [f"{name} {shown(value)}" for name, value in measured.items() if name != "rows"]
    if "rows" in measured:
        parts.append(f"{len(measured['rows'])} rows below")
    text = "; ".join(parts)
    return text if len(text) <= LONGEST_CELL else text[: LONGEST_CELL - 1] + "…"


def shown(value: Any) -> str:
    """Returns a value for a table: numbers with four digits, lists and mappings without brackets."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(shown, value))
    return str(value)
