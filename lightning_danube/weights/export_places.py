"""The place that an export writes: its lock, what may be replaced there, and a card that the user has changed.

Imports neither PyTorch nor a library of models, so that a wrong `--out` is refused at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from lightning_danube.files import locked, make_folder, new_folder, remove_leftovers
from lightning_danube.terminal import some, tell
from lightning_danube.weights.gguf.header import is_gguf
from lightning_danube.weights.names import ADAPTER_FILES, TOKENIZER_FILES

README = "README.md"
CARD_MARK = "<!-- export replaces this file while its SHA-256 is "
"""Begins the last line of a card that an export has written. A card without this line, or that has changed, is kept."""
# Files of a directory exported by this project or transformers. Overwriting never deletes other files.
EXPORTED_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    README,
)
EXPORTED_ADAPTER_FILES = (*ADAPTER_FILES, README, *TOKENIZER_FILES)


@contextmanager
def export_folder(directory: str | Path, known: Sequence[str], overwrite: bool) -> Iterator[Path]:
    """A new folder to export into. It takes the name `directory` at the end of the block.

    A README.md that the user has written or changed is kept. One that an export has written holds its own checksum.

    Args:
        known: patterns of the files that `overwrite` may replace.
    """
    target = export_target(directory)
    make_folder(target.parent)
    # This comes first: it restores the files that a killed export has set aside, and they must be checked.
    remove_leftovers(target.parent)
    check_target(target, known, overwrite)
    with new_folder(target, replace=True) as partial:
        yield partial
        card, old = partial / README, target / README
        if old.is_file() and not _is_unchanged_card(old.read_bytes()):
            card.write_bytes(old.read_bytes())
            tell(f"{old} is kept: it was changed after an export, or written by hand")
        elif card.is_file():
            card.write_bytes(_with_checksum(card.read_bytes()))


def export_target(path: str | Path) -> Path:
    """Returns the place that an export replaces. For a symbolic link that is the place that the link points to.

    Raises:
        ValueError: it holds the working directory, which would be removed under the shell.
    """
    target = Path(path).resolve()
    if Path.cwd().resolve().is_relative_to(target):
        raise ValueError(f"--out {path}: an export replaces the directory, and you are in it: name another one")
    return target


@contextmanager
def exporting(path: str | Path) -> Iterator[None]:
    """Holds the lock of a place that an export writes, so that no second export writes there at the same time.

    Raises:
        InUse: another process exports to this place.
    """
    target = export_target(path)
    with locked(target.with_name(f".{target.name}.lock"), f"--out {path}"):
        yield


def _with_checksum(card: bytes) -> bytes:
    return card + f"\n{CARD_MARK}{hashlib.sha256(card).hexdigest()} -->\n".encode()


def _is_unchanged_card(card: bytes) -> bool:
    content, mark, _ = card.rpartition(f"\n{CARD_MARK}".encode())
    return bool(mark) and card == _with_checksum(content)


def check_target(target: Path, known: Sequence[str], overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target} is a file; give a directory that does not exist yet")
    names = sorted(entry.name for entry in target.iterdir())
    if names and not overwrite:
        raise ValueError(
            f"{target} is not empty ({some(names)}): choose another directory, or replace its files by --overwrite"
        )
    foreign = [n for n in names if (target / n).is_dir() or not any(fnmatch(n, pattern) for pattern in known)]
    if foreign:
        raise ValueError(f"{target} holds more than an exported model ({some(foreign)}); it is not overwritten")


def check_gguf_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if target.is_dir():
        raise ValueError(f"{target} is a directory; give the name of a file")
    if not overwrite:
        raise ValueError(f"{target} exists: choose another name, or replace it by --overwrite")
    if not is_gguf(target):
        raise ValueError(f"{target} is not a GGUF file; it is not overwritten")
