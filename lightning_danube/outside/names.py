"""Names of files and folders that a file, a server or an option gives."""

from __future__ import annotations

from pathlib import Path

LONGEST = 200
"""Bytes of a name. File systems take 255; a file that is being written has a longer, hidden name."""


def plain_name(name: object, what: str) -> str:
    """Returns a name that stands for one file or folder in a directory, and for nothing outside it.

    Args:
        what: what has the name, at the beginning of the message.

    Raises:
        ValueError: the name is empty, is a path, is too long, or has characters that do not print.
    """
    wrong = _wrong_with(name)
    if wrong is not None:
        raise ValueError(f"{what} is {_quoted(name)}: {wrong}; it names a file or folder, so give a plain name")
    return str(name)


def inside(directory: Path, name: object, what: str) -> Path:
    """Returns the path of a name in a directory. Arguments and errors as for `plain_name`."""
    return directory / plain_name(name, what)


def _wrong_with(name: object) -> str | None:
    if not isinstance(name, str):
        return "that is not text"
    if not name.strip():
        return "that is empty"
    if name in (".", "..") or "/" in name or "\\" in name:
        return "that is a path"
    if not name.isprintable() or name != name.strip():
        return "it has a line end, a control character or white space at its ends"
    if len(name.encode()) > LONGEST:
        return f"it has {len(name.encode())} bytes, and at most {LONGEST} are possible"
    return None


def _quoted(name: object) -> str:
    shown = ascii(name) if isinstance(name, str) and not name.isprintable() else repr(name)
    return shown if len(shown) <= 80 else f"{shown[:60]}…"
