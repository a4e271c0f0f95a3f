"""A bounded folder of byte ranges that were read from object storage."""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from pathlib import Path

from lightning_danube.files import new_file

CACHED_BYTES = 1 << 30
"""Bytes of ranges that stay on the disk. Every process checks the size after it has written 1/64 of this."""


class RangeCache:
    """Keeps ranges on the disk of this machine, one file each, for all processes. The ranges used last stay.

    A training row is one range, so a file of the cache holds exactly what a later pass or a resumed run asks for again.

    Args:
        folder: where the ranges lie.
        most_bytes: see `CACHED_BYTES`.
    """

    def __init__(self, folder: Path, most_bytes: int = CACHED_BYTES) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._written = 0

    def get(self, key: str) -> bytes | None:
        """Returns a range, or None if it is not here or damaged."""
        path = self._path(key)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        found, checksum = content[:-4], content[-4:]
        if len(content) < 4 or zlib.crc32(found).to_bytes(4, "little") != checksum:
            return None
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            os.utime(path)
        return found

    def put(self, key: str, content: bytes) -> None:
        with new_file(self._path(key), clear=False) as partial:
            partial.write_bytes(content + zlib.crc32(content).to_bytes(4, "little"))
        self._written += len(content)
        if self._written >= self.most_bytes // 64:
            self._written = 0
            self._shrink()

    def _path(self, key: str) -> Path:
        return self.folder / hashlib.sha256(key.encode()).hexdigest()[:32]

    def _shrink(self) -> None:
        """Removes the ranges that were not used for the longest time."""
        found: list[tuple[int, int, str]] = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):
                state = entry.stat()
                found.append((state.st_mtime_ns, state.st_size, entry.path))
        over = sum(size for _, size, _ in found) - self.most_bytes
        for _, size, path in sorted(found):
            if over <= 0:
                break
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
            over -= size
