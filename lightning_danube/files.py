"""Files on disk: each appears complete or not at all. The cache directory."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], schema: Any = None) -> None:
    """
    Args:
        schema: of pyarrow; found from the values if not given.
    """
    import pyarrow as pa
    import pyarrow.parquet

    temporary = _beside(path)
    pyarrow.parquet.write_table(pa.Table.from_pylist(list(rows), schema=schema), temporary)
    os.replace(temporary, path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def default_cache_dir() -> Path:
    """$LIGHTNING_DANUBE_CACHE, else lightning-danube in the user's cache directory."""
    if explicit := os.environ.get("LIGHTNING_DANUBE_CACHE"):
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning-danube"
