"""What every result states about where it was measured, and where it is kept."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def described(*packages: str) -> str:
    """Day, commit, processor and versions, as one line."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    parts = [str(datetime.date.today()), f"commit {commit()}", processor(), f"{os.cpu_count()} cores"]
    return ", ".join([*parts, f"Python {platform.python_version()}", *versions])


def commit() -> str:
    found = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def write_result(name: str, text: str) -> None:
    """Prints a result and keeps it as results/<name>-<day>.md."""
    print(f"\n{text}")
    directory = ROOT / "benchmarks" / "results"
    directory.mkdir(exist_ok=True)
    (directory / f"{name}-{datetime.date.today()}.md").write_text(text.rstrip("\n") + "\n", encoding="utf-8")
