"""How the user types a command of this project: for usage lines, and for the command that comes next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

SCRIPT = "lightning-danube"


def as_typed() -> str:
    """The start of this command line: `lightning-danube`, or `python -m lightning_danube`."""
    return SCRIPT if _by_script() else "python -m lightning_danube"


def runnable() -> str:
    """The start of a command line that works when it is pasted here: a path where PATH does not lead to the program."""
    return program(SCRIPT) if _by_script() else f"{program('python')} -m lightning_danube"


def program(name: str) -> str:
    """A program of this environment as it can be typed here: its name if PATH leads to it, otherwise its path."""
    folder = Path(sys.executable).parent
    if name == "python" and not (folder / name).exists():
        name = Path(sys.executable).name
    found = shutil.which(name)
    if found is not None and Path(found).parent.resolve() == folder.resolve():
        return name
    path = folder / name
    return shlex.quote(os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path))


def quoted(text: object) -> str:
    """A text as one argument of a shell, in double quotes where that is enough."""
    text = str(text)
    if shlex.quote(text) == text or set(text) & set('"$`\\!'):
        return shlex.quote(text)
    return f'"{text}"'


def _by_script() -> bool:
    return Path(sys.argv[0]).stem == SCRIPT
