"""Checkpoint files with their sizes and hashes.

`files.py` writes a checkpoint, so it is complete or absent. Only a complete checkpoint is listed in `manifest.json` of
its directory.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from lightning_danube.files import make_folder, new_file, remove_all_leftovers, remove_whole, scratch_folder, write_json

MANIFEST = "manifest.json"
FILES = "files.json"
"""In a checkpoint that is a directory: the size of each file."""


class HashingWriter:
    """What `torch.save` asks of a file. Hashes what was meant to be written, not what a disk gives back."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.size = 0
        # torch reports a failed write as an internal error of its archive; this is the reason behind it.
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        size = memoryview(data).nbytes
        self._hash.update(data)
        self.size += size
        return size

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError as error:
            self.error = error
            raise

    def sha256(self) -> str:
        return self._hash.hexdigest()


def write_checkpoint(path: Path, write: Callable[[HashingWriter], None]) -> None:
    """Writes a checkpoint with `write` and lists it. When this returns, both survive a power cut.

    Raises:
        OSError: with the file's name and what to do. The checkpoints that were there before still are.
    """
    writer: HashingWriter | None = None
    try:
        prepare_directory(path.parent)
        with new_file(path) as partial:
            with partial.open("wb") as file:
                writer = HashingWriter(file)
                write(writer)
            # If the process were killed after the new file has the name, the old hash would call the file damaged.
            forget(path)
            if is_sharded(path):  # the same step, saved by a run of other sharding
                remove_checkpoint(path)
        _write_manifest(
            path.parent, read_manifest(path.parent) | {path.name: {"bytes": writer.size, "sha256": writer.sha256()}}
        )
    except BaseException as error:
        cause = writer.error if writer is not None and writer.error is not None else error
        if isinstance(cause, OSError):
            raise not_written(path, cause) from error
        raise


def not_written(path: Path, cause: BaseException, where: str = "") -> OSError:
    """What to tell a user of a checkpoint that could not be written.

    Args:
        where: said behind it.
    """
    if not isinstance(cause, OSError):
        # torch's writer reports a full disk as an error of its archive.
        full = shutil.disk_usage(path.parent).free < 2**20
        cause = (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if full
            else OSError(errno.EIO, " ".join(str(cause).split()))
        )
    what = f"checkpoint not written{where}: {_way_out(cause)}, then go on with --ckpt_path last"
    return OSError(cause.errno, what, str(path))


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint, also one that is a directory, and its entry in the manifest."""
    remove_whole(path)
    forget(path)


def forget(path: Path) -> None:
    """Removes a checkpoint's entry from the manifest."""
    listed = read_manifest(path.parent)
    if listed.pop(path.name, None) is not None:
        _write_manifest(path.parent, listed)


def prepare_directory(directory: Path) -> None:
    """Makes a directory for checkpoints and removes what killed processes left there.

    Raises:
        OSError: nothing can be written there, with its name and what to do.
    """
    try:
        make_folder(directory)
        remove_all_leftovers(directory)
        with scratch_folder(directory / "probe"):
            pass
    except OSError as error:
        raise OSError(error.errno, f"checkpoints can not be written here: {_way_out(error)}", str(directory)) from error


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's file, or None.

    A file that its manifest does not list was copied there, or its writer was killed between renaming and listing it:
    the checksums inside the archive speak for it. Of a directory, which many ranks have written, the sizes are
    compared; its tensors have no hash.
    """
    try:
        if checkpoint.is_dir():
            return _directory_damage(checkpoint)
        entry = read_manifest(checkpoint.parent).get(checkpoint.name)
        if entry is None:
            return _archive_damage(checkpoint)
        size = checkpoint.stat().st_size
        if size != entry["bytes"]:
            return f"{size:,} bytes, {entry['bytes']:,} were saved"
        with checkpoint.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != entry["sha256"]:
            return f"its content changed since it was saved (SHA-256 {found[:12]}…, not {entry['sha256'][:12]}…)"
    except OSError as error:
        return error.strerror or str(error)
    return None


def refuse_address(path: str) -> None:
    """Raises ValueError for a URL: what comes over a network has no hash to check it by."""
    if re.match(r"[A-Za-z][\w+.-]*:/", path):
        raise ValueError(f"{path}: checkpoints are read and written as files of this machine only; copy it here first")


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """Name → bytes and sha256 of the checkpoints in a directory; empty if there is no manifest or it is unreadable."""
    try:
        listed = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["checkpoints"]
        return {
            str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])} for name, entry in listed.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # The checkpoints are then judged by their own checksums.
        return {}


def _write_manifest(directory: Path, listed: Mapping[str, Mapping[str, Any]]) -> None:
    there = {name: dict(entry) for name, entry in sorted(listed.items()) if (directory / name).exists()}
    write_json(directory / MANIFEST, {"checkpoints": there})


def is_sharded(path: Path) -> bool:
    """Whether a directory is a checkpoint that many ranks have written."""
    return (path / FILES).is_file()


def _directory_damage(checkpoint: Path) -> str | None:
    if not is_sharded(checkpoint):
        return f"no {FILES} in the directory: another program wrote it"
    for name, size in json.loads((checkpoint / FILES).read_text(encoding="utf-8")).items():
        file = checkpoint / name
        found = file.stat().st_size if file.exists() else None
        if found != size:
            return f"{name} is missing" if found is None else f"{name} has {found:,} bytes, {size:,} were saved"
    return None


def read_plain(path: Path, *, mmap: bool = False, map_location: Any = "cpu") -> dict[str, Any]:
    """What `torch.save` wrote, if it is tensors and plain data.

    Raises:
        ValueError: the file holds more than that, or is no checkpoint.
    """
    import torch

    try:
        content: dict[str, Any] = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f" (it asks for {asked[1]})" if asked else ""
        raise ValueError(
            f"{path} holds more than tensors and plain data{what}: loading it could run code, so it is refused"
        ) from error
    except (RuntimeError, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no checkpoint: {str(error).splitlines()[0]}") from error
    return content


def _archive_damage(checkpoint: Path) -> str | None:
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        return f"truncated or no checkpoint ({error})"
    return None if broken is None else f"its content changed since it was saved (checksum of {broken})"


def _way_out(error: OSError) -> str:
    todo = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space",
        errno.EROFS: "make the file system writable or name another place with --runs",
        errno.EACCES: "change the permissions or name another place with --runs",
        errno.EPERM: "change the permissions or name another place with --runs",
        errno.EEXIST: "move what is there out of the way",
        errno.ENOTDIR: "move what is there out of the way",
        errno.EISDIR: "move what is there out of the way",
    }
    what = todo.get(error.errno or 0, "see to it")
    return f"{(error.strerror or str(error)).lower()}; {what}"
