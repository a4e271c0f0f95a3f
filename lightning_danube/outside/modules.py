"""Which modules of the working directory this program imports: only those that a configuration names.

`python -m` puts the working directory at the front of the import path. A file `wandb.py` in a folder of somebody's data
would then be run in place of the package, or where the package is missing.
"""

from __future__ import annotations

import os
import re
import sys

_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def leave_working_directory() -> None:
    """Takes the working directory off the import path, if `python -m` put it there and this package is not in it."""
    here = os.getcwd()
    if sys.path and sys.path[0] in ("", here) and os.path.realpath(here) != os.path.realpath(_PACKAGE):
        del sys.path[0]


def let_in(text: str) -> None:
    """Lets modules of the working directory be imported, behind all others, if a text of a configuration names one."""
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        return
    for module in re.findall(r"(?<![\w./-])([A-Za-z_]\w*)\.[A-Za-z_]", text):
        if os.path.isfile(f"{module}.py") or os.path.isdir(module):
            sys.path.append(here)
            return
