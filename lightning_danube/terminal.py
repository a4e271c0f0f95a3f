"""Lines for a terminal: tables, commands as the user types them, and the name that was meant by a mistyped one."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lightning_danube.outside.secrets import redacted
from lightning_danube.outside.texts import in_markdown, printable

SCRIPT = "lightning-danube"
MOST_NAMES = 60
"""Names that a message lists. A directory may have thousands of runs."""
Table = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Header and rows."""


def as_typed() -> str:
    """Returns the start of this command line: `lightning-danube`, or `python -m lightning_danube`."""
    return SCRIPT if _by_script() else "python -m lightning_danube"


def runnable() -> str:
    """Returns the start of a command line that works in this shell: the program's path if PATH does not contain it."""
    return program(SCRIPT) if _by_script() else f"{program('python')} -m lightning_danube"


def program(name: str) -> str:
    """Returns how to call a program of this environment: by its name if PATH leads to it, otherwise by its path.

    The path is relative inside the working directory, and absolute elsewhere: `../../venv/bin/python` helps nobody.
    """
    folder = Path(sys.executable).parent
    folder = folder.resolve() if ".." in folder.parts else folder
    if name == "python" and not (folder / name).exists():
        name = Path(sys.executable).name
    found = shutil.which(name)
    if found is not None and Path(found).parent.resolve() == folder.resolve():
        return name
    path = folder / name
    return shlex.quote(os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path))


def quoted(text: object) -> str:
    """Returns a text as one shell argument, in double quotes if these are enough."""
    text = str(text)
    if shlex.quote(text) == text or set(text) & set('"$`\\!'):
        return shlex.quote(text)
    return f'"{text}"'


def _by_script() -> bool:
    return Path(sys.argv[0]).stem == SCRIPT


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a table with padded columns: the first column aligned left, the others right."""
    shown = [[printable(cell.replace("\n", " ")) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[column]) for row in shown) for column in range(len(header))]
    lines = []
    for row in shown:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "─" * len(max(lines, key=len)))
    return "\n".join(lines)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table. A cell shows its text: no untrusted text becomes markup."""
    lines = [[in_markdown(cell) for cell in row] for row in [header, *rows]]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def amount(number: int, thing: str) -> str:
    """Returns a number with the noun it counts, such as "1 epoch" or "1,024 devices"."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def counted(number: int, one: str, many: str) -> str:
    """Returns a number with the words for one or for several, such as "1 tensor is" and "3 tensors are"."""
    return f"{number:,} {one if number == 1 else many}"


def some(names: Iterable[str]) -> str:
    """Formats at most three of the names, and the number of the others."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def markdown_code(text: str) -> str:
    """Returns a text as a block of Markdown code, which keeps line breaks."""
    return "\n".join("    " + printable(line) for line in text.splitlines())


def show(text: object = "", *, end: str = "\n") -> None:
    """Prints a text to stdout. Hides secrets, and shows control characters as their codes."""
    print(printable(redacted(str(text))), end=end, flush=True)


def tell(text: object) -> None:
    """Prints a line to stderr, so that stdout has only the output of the run. Hides as `show` does."""
    print(printable(redacted(str(text))), file=sys.stderr, flush=True)


def clean_logs() -> None:
    """Makes the log lines and warnings of all libraries hide secrets and show control characters, as `show` does."""
    make, write = logging.getLogRecordFactory(), warnings.formatwarning

    def cleaned(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        with suppress(Exception):  # a line whose values do not fit is left to the library's own handler
            record.msg, record.args = printable(redacted(record.getMessage())), ()
        return record

    def formatted(*args: Any, **kwargs: Any) -> str:
        return printable(redacted(write(*args, **kwargs)))

    logging.setLogRecordFactory(cleaned)
    warnings.formatwarning = formatted


def nearest_name(name: object, known: Iterable[str], least: float = 0.6) -> str | None:
    """Returns the known name that is most similar to a mistyped one; None if none is similar.

    Args:
        least: similarity from which on a name counts, between 0 and 1 as in `difflib`.
    """
    return next(iter(get_close_matches(str(name), list(known), n=1, cutoff=least)), None)


def name_meant(name: object, known: Iterable[str], otherwise: str = "there are", least: float = 0.6) -> str:
    """Returns "did you mean 'x'?" for the nearest known name. If none is near: `otherwise`, then the known names."""
    known = list(known)
    near = nearest_name(name, known, least)
    if near is not None:
        return f"did you mean {near!r}?"
    more = f" and {len(known) - MOST_NAMES:,} more" if len(known) > MOST_NAMES else ""
    return f"{otherwise} {', '.join(known[:MOST_NAMES])}{more}"


def minutes_and_seconds(seconds: float) -> str:
    """Returns a duration such as "2 min 05 s"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s"
