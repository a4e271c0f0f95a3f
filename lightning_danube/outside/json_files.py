"""Reads JSON of others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def json_in(file: Path) -> Any:
    """Returns the value in a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no ordinary file, whose reading could go on for ever, or no JSON.
    """
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is no ordinary file")
    return parsed_json(file.read_bytes())


def parsed_json(text: str | bytes) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: it is no JSON, no UTF-8, or nested too deep to read.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
