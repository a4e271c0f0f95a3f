"""What every result states about where it was measured, and where it is kept."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from pathlib import Path

from lightning_danube.provenance import commit, machine

ROOT = Path(__file__).resolve().parents[1]


def described(*packages: str) -> str:
    """Day, commit, processor and versions, as one line."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    parts = [str(datetime.date.today()), f"commit {commit()}", machine()]
    return ", ".join([*parts, f"Python {platform.python_version()}", *versions])


def write_result(name: str, text: str) -> None:
    """Prints a result and keeps it as results/<name>-<day>.md."""
    print(f"\n{text}")
    directory = ROOT / "benchmarks" / "results"
    directory.mkdir(exist_ok=True)
    (directory / f"{name}-{datetime.date.today()}.md").write_text(text.rstrip("\n") + "\n", encoding="utf-8")
