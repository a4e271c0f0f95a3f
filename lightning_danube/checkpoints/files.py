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
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NamedTuple

from lightning_danube.files import (
    SHORTAGES,
    check_regular,
    is_out_of_memory,
    make_folder,
    new_file,
    read_json,
    remove_whole,
    scratch_folder,
    write_json,
)

MANIFEST = "manifest.json"
INDEX, PART, REST = ".metadata", ".distcp", "rest.pt"
"""Files inside a sharded checkpoint: torch's index of the tensors, the end of the names of the ranks' files, and
everything that is not a tensor."""
FILES = "files.json"
"""File inside a sharded checkpoint (a directory) that lists the size and the hash of each of its files."""


class Listed(NamedTuple):
    """What a list of files says of one. `sha256` is None in a sharded checkpoint of an older version."""

    bytes: int
    sha256: str | None

    @staticmethod
    def of(entry: Any) -> Listed:
        """
        Raises:
            ValueError: the entry was damaged.
        """
        if type(entry) is int:
            return Listed(entry, None)
        size, sha256 = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if type(size) is not int or not isinstance(sha256, str):
            raise ValueError(f"{str(entry)[:60]} is neither a size nor a size and a hash")
        return Listed(size, sha256)


class HashingWriter:
    """A file for `torch.save` that hashes the bytes as they are written, before the disk can damage them.

    torch's writer of sharded checkpoints also asks for the place, flushes to the disk by number, and closes the file.
    """

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

    def tell(self) -> int:
        return self.size

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()

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
        _write_manifest(path.parent, read_manifest(path.parent) | {path.name: Listed(writer.size, writer.sha256())})
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
        "resume with --ckpt_path last" if any(path.parent.glob("*step_*.ckpt")) else "begin again: none was written yet"
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
        with scratch_folder(directory / "probe"):  # which removes leftovers first
            pass
    except OSError as error:
        raise OSError(error.errno, f"checkpoints cannot be written here: {_way_out(error)}", str(directory)) from error


def damage(checkpoint: Path) -> str | None:
    """Returns what is wrong with a checkpoint, or None.

    A file is compared with its size and hash in the manifest. The manifest may lack a file that was copied, or whose
    writer was killed between renaming and listing it: then the checksums inside the archive decide. Each file of a
    directory, which many ranks have written, is compared with its size and hash in `files.json`. In a directory of an
    older version, only the sizes are known.

    Raises:
        OSError, MemoryError, RuntimeError: the system lacks memory, threads or descriptors. The checkpoint may be
            complete.
    """
    try:
        if checkpoint.is_dir():
            return _directory_damage(checkpoint)
        check_regular(checkpoint)
        entry = read_manifest(checkpoint.parent).get(checkpoint.name)
        return _archive_damage(checkpoint) if entry is None else _file_damage(checkpoint, entry)
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
        return error.strerror or str(error)


def _file_damage(file: Path, saved: Listed) -> str | None:
    check_regular(file)
    size = file.stat().st_size
    if size != saved.bytes:
        return f"{size:,} bytes, {saved.bytes:,} were saved"
    if saved.sha256 is None:
        return None
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found == saved.sha256:
        return None
    return f"its content changed since it was saved (SHA-256 {found[:12]}…, not {saved.sha256[:12]}…)"


def refuse_address(path: str) -> None:
    """Raises ValueError for a URL, because a checkpoint from a network has no hash to check it against."""
    if re.match(r"[A-Za-z][\w+.-]*:/", path):
        raise ValueError(f"{path}: checkpoints are read and written as files of this machine only; copy it here first")


def read_manifest(directory: Path) -> dict[str, Listed]:
    """Returns checkpoint name → size and hash. Empty if the directory has no manifest or an unreadable manifest."""
    try:
        listed = read_json(directory / MANIFEST).get("checkpoints")
        entries = listed.items() if isinstance(listed, dict) else ()
        return {name: found for name, entry in entries if (found := Listed.of(entry)).sha256 is not None}
    except OSError as error:
        if error.errno in SHORTAGES:
            raise
    except ValueError:
        pass
    return {}  # `damage` then uses the checksums inside each archive


def _write_manifest(directory: Path, listed: Mapping[str, Listed]) -> None:
    there = {name: entry._asdict() for name, entry in sorted(listed.items()) if (directory / name).exists()}
    write_json(directory / MANIFEST, {"checkpoints": there})


def write_list(directory: Path, listed: Mapping[str, Listed]) -> None:
    """Writes the list of the files of a sharded checkpoint, whose directory has no name yet and is flushed later."""
    entries = {name: entry._asdict() for name, entry in sorted(listed.items())}
    (directory / FILES).write_text(json.dumps(entries, indent=2) + "\n")


def is_sharded(path: Path) -> bool:
    """Returns whether a path is a sharded checkpoint: a directory that many ranks have written."""
    return (path / FILES).is_file()


def _directory_damage(checkpoint: Path) -> str | None:
    if not is_sharded(checkpoint):
        return f"no {FILES} in the directory: another program wrote it"
    try:
        listed = {name: Listed.of(entry) for name, entry in read_json(checkpoint / FILES).items()}
    except ValueError as error:
        return f"{FILES} is damaged: {str(error).removeprefix(f'{checkpoint / FILES}: ')}"
    there = {file.name for file in checkpoint.iterdir()}
    if missing := listed.keys() - there:
        return f"{min(missing)} is missing"
    # A damaged name in the list would leave out a file that is read.
    if unlisted := {INDEX, REST, *(name for name in there if name.endswith(PART))} - listed.keys():
        return f"{min(unlisted)} is not in {FILES}"
    return _first_damage((checkpoint / name, saved) for name, saved in sorted(listed.items()))


def _first_damage(files: Iterable[tuple[Path, Listed]]) -> str | None:
    """Returns what is wrong with the first damaged file. Hashing takes one core for each file, up to eight."""

    def of(one: tuple[Path, Listed]) -> str | None:
        wrong = _file_damage(*one)
        return f"{one[0].name}: {wrong}" if wrong else None

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return next(filter(None, pool.map(of, files)), None)


def read_plain(path: Path, *, mmap: bool = False, map_location: Any = "cpu") -> dict[str, Any]:
    """Reads a file of `torch.save` that holds only tensors and plain data.

    Raises:
        ValueError: the file holds other objects, or is not a checkpoint.
    """
    import torch

    try:
        check_regular(path)
        content: Any = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:  # torch's reader raises whatever the bytes lead to
        if is_out_of_memory(error):
            raise
        if isinstance(error, pickle.UnpicklingError) and (asked := re.search(r"GLOBAL (\S+)", str(error))):
            raise ValueError(
                f"{path} holds more than tensors and plain data (it asks for {asked[1]}): loading it could run code, "
                "so it is refused"
            ) from error
        raise ValueError(
            f"{path}: truncated, or no checkpoint that holds only tensors and plain data ({one_line(error)})"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} is not a checkpoint: it holds a {type(content).__name__}, not a mapping of names")
    return content


def one_line(error: BaseException) -> str:
    """Returns the type of a library's error on a damaged file, and the first sentence of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].partition('. ')[0][:200]}" if lines else type(error).__name__


def _archive_damage(checkpoint: Path) -> str | None:
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            broken = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # a truncated, damaged, encrypted or foreign archive: each has an error of its own
        if is_out_of_memory(error):
            raise
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
    said = (error.strerror or str(error)).removeprefix("not written: ")
    return f"{said.lower()}; {what}"
