"""Runs the parts of the check that take too long for each commit, and records when each ran last and how it ended.

    python .ci/parts.py                 shows the parts and the record
    python .ci/parts.py notebooks …     runs these parts
    python .ci/parts.py --all           runs all parts, the one that waited longest first
    python .ci/parts.py --next          runs the one part whose turn it is: this is what .ci/run does

The record is .ci/record.md. A run in CI cannot commit it. So the turn is a part further for each commit since the
record was committed, and all parts run within as many commits as there are parts.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / ".ci" / "record.md"
HEADER = """# When each part of the long check ran last

Written by [parts.py](parts.py).

| part | last run | commit | processor | minutes | ended |
|---|---|---|---|---|---|
"""
TIME_LIMIT = 30 * 60
NEVER = "never"


def slow(*folders: str) -> list[str]:
    return ["make", "--no-print-directory", "test-slow", f"ARGS={' '.join(f'tests/{folder}' for folder in folders)}"]


def mutants(*tables: str) -> list[str]:
    return ["make", "--no-print-directory", "mutants", f"ARGS=--again {' '.join(tables)}"]


PARTS = {
    "mutants-statistics": mutants("callbacks", "cli", "intervals", "planning", "reports", "studies"),
    "mutants-tasks": mutants("chat", "classification", "evaluation", "inspection", "quantization"),
    "mutants-model": mutants("checkpoints", "files", "generation", "model", "training", "weights"),
    "mutants-data": mutants("docs", "options", "outside", "pretraining", "text", "tokens"),
    "slow-checkpoints": slow("checkpoints"),
    "slow-ranks": slow("training", "model"),
    "slow-tasks": slow("chat", "classification", "evaluation", "pretraining", "quantization"),
    "slow-commands": slow(
        "adding", "cli", "docs", "test_configs.py", "test_portability.py", "test_signals.py", "text", "tokens"
    ),
    "slow-weights": slow("generation", "weights"),
    "slow-benchmarks": slow("benchmarks"),
    "faults": ["make", "--no-print-directory", "test-faults"],
    "kernels": ["make", "--no-print-directory", "test-kernels"],
    "slurm": [".ci/slurm"],
    "ray": ["make", "--no-print-directory", "test-ray"],
    "notebooks": slow("test_notebooks.py"),
    "newest": [".ci/newest"],
    "lowest": ["make", "--no-print-directory", "test-lowest"],
    "installs": ["make", "--no-print-directory", "install-all"],
}
"""Name of a part → its command. Each takes at most 20 minutes on two cores."""


def record() -> dict[str, list[str]]:
    """Name of a part → the cells of its row."""
    lines = RECORD.read_text(encoding="utf-8").splitlines() if RECORD.exists() else []
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in rows if row[0] in PARTS}


def waiting_longest() -> list[str]:
    """All parts. The first is the one that has not run for the longest time."""
    last = {name: cells[0] for name, cells in record().items() if cells[0] != NEVER}
    return sorted(PARTS, key=lambda name: last.get(name, ""))


def turn() -> str:
    """The part that `--next` runs."""
    last = git("log", "-1", "--format=%H", "--", str(RECORD))
    commits = git("rev-list", "--count", f"{last}..HEAD" if last else "HEAD")
    return waiting_longest()[int(commits or 0) % len(PARTS)]


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    name = re.search(r"model name\s*: (.*)", text)
    flags = next(flag for flag in ("avx512f", "avx2", "") if flag in text)
    return f"{name[1] if name else platform.machine()}, {flags or 'no AVX2'}, {os.cpu_count()} cores"


def run(name: str) -> bool:
    """Runs a part and writes its row. Returns whether it passed."""
    print(f"== part {name}: {' '.join(PARTS[name])}", flush=True)
    began = time.monotonic()
    process = subprocess.Popen(PARTS[name], cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(TIME_LIMIT)
        ended = "passed" if code == 0 else f"failed, exit code {code}"
    except subprocess.TimeoutExpired:
        ended = f"stopped after {TIME_LIMIT // 60} minutes"
    finally:
        # Also what make has started.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    when = datetime.now(UTC).strftime("%Y-%m-%d %H:%M")
    minutes = f"{(time.monotonic() - began) / 60:.1f}"
    rows = record() | {name: [when, git("rev-parse", "--short", "HEAD"), processor(), minutes, ended]}
    lines = [f"| {part} | {' | '.join(rows.get(part, [NEVER, '', '', '', '']))} |\n" for part in PARTS]
    RECORD.write_text(HEADER + "".join(lines), encoding="utf-8")
    print(f"== part {name}: {ended}, {minutes} min", flush=True)
    return ended == "passed"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="names of parts", metavar="part")
    parser.add_argument("--all", action="store_true", help="run all parts")
    parser.add_argument("--next", action="store_true", help="run the part whose turn it is")
    arguments = parser.parse_args()
    parts = waiting_longest() if arguments.all else [turn()] if arguments.next else arguments.parts
    if not parts:
        known = record()
        for name in PARTS:
            print(f"{name:20} {'  '.join(known.get(name, [NEVER]))}")
        print(f"next: {turn()}")
    return 0 if all([run(name) for name in parts]) else 1


if __name__ == "__main__":
    sys.exit(main())
