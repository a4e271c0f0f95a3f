"""How to install what an optional feature needs."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path


def pip_command(requirements: str) -> str:
    """What to type to install something into this environment without another torch getting in.

    The installed torch is named at its version, without its build (+cpu): a requirement of it further down could
    otherwise replace it.
    """
    python = Path(sys.executable)
    if python.is_relative_to(Path.cwd()):
        python = Path(os.path.relpath(python))
    torch = importlib.metadata.version("torch").partition("+")[0]
    return f"{python} -m pip install -c constraints.txt torch=={torch} {requirements}"
