"""Reads ranges of bytes: of local files, and of files in object storage by requests for the range."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_danube.outside.secrets import redacted
from lightning_danube.text.corpora import pattern_of
from lightning_danube.tokens.finished_shards import is_address, open_store, unreachable
from lightning_danube.tokens.foreign.range_cache import RangeCache
from lightning_danube.tokens.token_sequence import OpenFiles


@dataclass(frozen=True)
class FoundFile:
    """A file, its size, and a text that changes when its content changes."""

    path: str
    bytes: int
    stamp: str


class ByteRanges:
    """The files of one source. A file is opened when it is first read, in each process.

    Args:
        path: the source's path: a file, a glob, or an address of either.
        cache_dir: holds the ranges that were read from object storage.
    """

    def __init__(self, path: str, cache_dir: Path) -> None:
        self.path = path
        self._cache = RangeCache(cache_dir / "token-ranges") if is_address(path) else None
        self._files = OpenFiles()
        self._opened: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for another process, which opens the files itself."""
        return {**vars(self), "_opened": None}

    def find(self, pattern: str) -> list[FoundFile]:
        """Returns the files that a path or a glob names, in the order of their names.

        Raises:
            ValueError: the store is out of reach.
        """
        if not is_address(self.path):
            path = os.path.expanduser(pattern)
            named = [path] if os.path.exists(path) else glob.glob(pattern_of(path), recursive=True)
            files = [(file, os.stat(file)) for file in sorted(named) if os.path.isfile(file)]
            return [FoundFile(file, state.st_size, str(state.st_mtime_ns)) for file, state in files]
        protocol = pattern.partition("://")[0]
        store = self._store()
        try:
            store.invalidate_cache()
            listed = store.glob(pattern.partition("://")[2], detail=True)
            return [
                FoundFile(f"{protocol}://{name.lstrip('/')}", int(facts["size"]), _stamp(facts))
                for name, facts in sorted(listed.items())
                if facts["type"] == "file"
            ]
        except Exception as error:  # also a listing without sizes, which some stores give
            raise unreachable(redacted(self.path), error) from error

    def read(self, path: str, start: int, stop: int, stamp: str = "") -> memoryview:
        """Returns the bytes [start, stop) of a file.

        Args:
            stamp: of `FoundFile`; a range of a file that has changed is not taken from the cache.

        Raises:
            ValueError: the file is missing, ends before `stop`, or cannot be read.
        """
        found = self._local(path, start, stop) if self._cache is None else self._remote(path, start, stop, stamp)
        if len(found) != stop - start:
            raise ValueError(
                f"{redacted(path)} ends at byte {start + len(found):,}, and byte {stop:,} was asked for: the file "
                "was cut off; copy it again"
            )
        return found

    def _local(self, path: str, start: int, stop: int) -> memoryview:
        try:
            found = self._files.read(path, start, stop)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing: put it back, or name other files") from None
        if not len(found) and not os.path.getsize(path):
            raise ValueError(f"{path} is empty: remove it, or copy it again")
        return found.data

    def _remote(self, path: str, start: int, stop: int, stamp: str) -> memoryview:
        assert self._cache is not None
        key = f"{path} {stamp} {start} {stop}"
        content = self._cache.get(key) if stamp else None
        if content is None:
            content = b""
            if stop > start:
                content = self._asked(path, lambda store: store.cat_file(path, start=start, end=stop))
            if len(content) > stop - start:
                raise ValueError(
                    f"{redacted(path)}: the server sends the whole file and no ranges: copy the files to this machine"
                )
            if stamp and len(content) == stop - start:
                self._cache.put(key, content)
        return memoryview(content)

    def sizes(self, folder: str) -> dict[str, int]:
        """Returns name → size of the files of a folder in object storage, as far as the store lists sizes."""
        with suppress(Exception):
            store = self._store()
            store.invalidate_cache()
            listed = store.ls(folder, detail=True)
            return {PurePosixPath(file["name"]).name: file["size"] for file in listed if file.get("size") is not None}
        return {}

    def size(self, path: str) -> int:
        """Returns the size of a file in object storage.

        Raises:
            ValueError: the file is missing, or the store is out of reach.
        """
        return int(self._asked(path, lambda store: store.size(path)))

    def digest(self, path: str) -> str:
        """Reads a whole file in object storage. Returns its SHA-256.

        Raises:
            ValueError: see `size`.
        """

        def read(store: Any) -> str:
            with store.open(path, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        return str(self._asked(path, read))

    def _asked(self, path: str, ask: Callable[[Any], Any]) -> Any:
        store = self._store()
        try:
            return ask(store)
        except FileNotFoundError:
            raise ValueError(f"{redacted(path)} is missing: copy it there again, or name other files") from None
        except Exception as error:
            raise unreachable(redacted(path), error) from error

    def _store(self) -> Any:
        # A store belongs to the process that opened it: its connections do not survive a fork.
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = (os.getpid(), open_store(redacted(self.path), self.path)[0])
        return self._opened[1]


class StampedFiles:
    """Files in object storage as the files of a `TokenSequence`.

    Args:
        stamps: address of a file → a text that changes when its content changes.
    """

    def __init__(self, ranges: ByteRanges, stamps: Mapping[str, str]) -> None:
        self._ranges, self._stamps = ranges, stamps

    def read(self, path: Path | str, begin: int, end: int) -> NDArray[np.uint8]:
        address = str(path)
        return np.frombuffer(self._ranges.read(address, begin, end, self._stamps[address]), dtype=np.uint8)


def _stamp(facts: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "mtime", "created"):
        if facts.get(key):
            return str(facts[key])
    return str(facts["size"])
