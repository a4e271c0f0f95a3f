"""What every result states about where it was measured, and where it is kept."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_danube.files import write_parquet
from lightning_danube.training.history import commit, machine

ROOT = Path(__file__).resolve().parents[1]


def described(*packages: str) -> str:
    """Day, commit, processor and versions, as one line."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    parts = [str(datetime.date.today()), f"commit {commit()}", machine()]
    return ", ".join([*parts, instructions(), f"Python {platform.python_version()}", *versions])


def instructions() -> str:
    """The vector instructions that PyTorch uses here, and whether the environment has lowered them."""
    chosen = any(os.environ.get(name) for name in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"))
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{capability} by ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA" if chosen else capability


def write_result(name: str, text: str, rows: Sequence[dict[str, Any]] = ()) -> None:
    """Prints a result and keeps it as results/<name>-<day>.md; rows, each with where it was measured, as .parquet."""
    print(f"\n{text}")
    directory = ROOT / "benchmarks" / "results"
    directory.mkdir(exist_ok=True)
    file = directory / f"{name}-{datetime.date.today()}.md"
    file.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    if rows:
        command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
        where = {
            "command": command,
            "date": str(datetime.date.today()),
            "commit": commit(),
            "machine": machine(),
        }
        write_parquet(file.with_suffix(".parquet"), [{**row, **where} for row in rows])
