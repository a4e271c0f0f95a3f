"""Checkpoint files with their sizes and hashes.

A checkpoint on disk is complete or absent. The `manifest.json` of its directory lists complete checkpoints only.
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

from lightning_danube.files import make_folder, new_file, remove_leftovers, remove_whole, scratch_folder, write_json

MANIFEST = "manifest.json"
FILES = "files.json"
"""File inside a sharded checkpoint (a directory) that lists the size of each of its files."""


class HashingWriter:
    """A file for `torch.save` that hashes the bytes as they are written, before the disk can damage them."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._hash = file, hashlib.sha256()
        self.size = 0
        # torch reports a failed write as an internal error of its archive; this attribute keeps the real cause.
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
    """Writes a checkpoint with `write` and lists it in the manifest. On return, both survive a power cut.

    Raises:
        OSError: the write failed. Names the file and what to do. Earlier checkpoints stay intact.
    """
    writer: HashingWriter | None = None
    try:
        prepare_directory(path.parent)
        with new_file(path) as partial:
            with partial.open("wb") as file:
                writer = HashingWriter(file)
                write(writer)
            # If the process were killed after the rename, the old hash would make the new file look damaged.
            forget(path)
            if is_sharded(path):  # a run with other sharding saved the same step
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
    """Returns the error that tells the user why a checkpoint could not be written, and what to do.

    Args:
        where: text after "checkpoint not written", such as " (rank 3)".
    """
    if not isinstance(cause, OSError):
        # torch's writer reports a full disk as an error of its archive.
        full = shutil.disk_usage(path.parent).free < 2**20
        cause = (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if full
            else OSError(errno.EIO, " ".join(str(cause).split()))
        )
    go_on = (
        "go on with --ckpt_path last" if any(path.parent.glob("*step_*.ckpt")) else "begin again: none was written yet"
    )
    what = f"checkpoint not written{where}: {_way_out(cause)}, then {go_on}"
    return OSError(cause.errno, what, str(path))


def remove_checkpoint(path: Path) -> None:
    """Removes a checkpoint (a file or a directory) and its entry in the manifest."""
    remove_whole(path)
    forget(path)


def forget(path: Path) -> None:
    """Removes a checkpoint's entry from the manifest."""
    listed = read_manifest(path.parent)
    if listed.pop(path.name, None) is not None:
        _write_manifest(path.parent, listed)


def prepare_directory(directory: Path) -> None:
    """Makes a directory for checkpoints and removes the leftovers of killed processes.

    Raises:
        OSError: the directory is not writable. Names the directory and what to do.
    """
    try:
        make_folder(directory)
        remove_leftovers(directory)
        with scratch_folder(directory / "probe"):
            pass
    except OSError as error:
        raise OSError(error.errno, f"checkpoints can not be written here: {_way_out(error)}", str(directory)) from error


def damage(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None.

    A file is compared with its size and hash in the manifest. The manifest may lack a file that was copied, or whose
    writer was killed between renaming and listing it: then the checksums inside the archive decide. For a directory,
    which many ranks have written, only the file sizes are compared, because its tensors have no hash.
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
    """Raises ValueError for a URL, because a checkpoint from a network has no hash to check it against."""
    if re.match(r"[A-Za-z][\w+.-]*:/", path):
        raise ValueError(f"{path}: checkpoints are read and written as files of this machine only; copy it here first")


def read_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    """Returns checkpoint name → bytes and sha256. Empty if the directory has no manifest or an unreadable manifest."""
    try:
        listed = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["checkpoints"]
        return {
            str(name): {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])} for name, entry in listed.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # `damage` then uses the checksums inside each archive.
        return {}


def _write_manifest(directory: Path, listed: Mapping[str, Mapping[str, Any]]) -> None:
    there = {name: dict(entry) for name, entry in sorted(listed.items()) if (directory / name).exists()}
    write_json(directory / MANIFEST, {"checkpoints": there})


def is_sharded(path: Path) -> bool:
    """Returns whether a path is a sharded checkpoint: a directory that many ranks have written."""
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
    """Reads a file of `torch.save` that holds only tensors and plain data.

    Raises:
        ValueError: the file holds other objects, or is no checkpoint.
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
