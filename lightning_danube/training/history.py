"""Records the changes between the sessions of a run, and the commit and machine of each session."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from lightning_danube.files import append_line

_SAY_NOTHING = {"ckpt_path", "config"}
_PACKAGES = ("lightning-danube", "torch", "lightning", "transformers")


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns key → (old value, new value) for each key that differs; None stands for a missing key."""
    before, after = _flat(old), _flat(new)
    keys = [key for key in {**before, **after} if key.split(".")[0] not in _SAY_NOTHING]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Returns nested values by dotted key, without `init_args`. Stages and callbacks have their name, not a number."""
    if isinstance(value, dict) and value:
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        names = [str(item.get("name") or item.get("class_path", "")).rpartition(".")[2] for item in value]
        unique = Counter(names)
        items = [
            (name if name and unique[name] == 1 else str(number), item)
            for number, (name, item) in enumerate(zip(names, value, strict=True))
        ]
    else:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for name, item in items:
        key = prefix if name == "init_args" else f"{prefix}.{name}" if prefix else name
        flat |= _flat(item, key)
    return flat


def append_history(path: Path, **facts: Any) -> None:
    """Adds a line to the run's history: the time, the versions, the commit, and the caller's facts."""
    record = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        **facts,
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in _PACKAGES if _installed(name)},
        "commit": commit(),
    }
    append_line(path, json.dumps(record, ensure_ascii=False, default=str))


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def commit() -> str | None:
    """Returns the commit of this code, with "+changes" if files differ from it; None outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        changes = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if head.returncode or changes.returncode:
        return None
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def machine() -> str:
    """Returns the processor and the number of cores."""
    return f"{processor()}, {os.cpu_count()} cores"


def processor() -> str:
    """Returns the name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
