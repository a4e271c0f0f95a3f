"""Reads the header of a GGUF file: its fields, and the place of each tensor.

The package `gguf` reads the header too, but makes an object per value: 6.4 s for the 98,000 strings of SmolLM2's
tokenizer, where this module takes 0.2 s. And `gguf` trusts every count: an array that claims a billion values fills the
memory before the end of the file is noticed. This module checks that data fit into the file before it reads them.
"""

from __future__ import annotations

import mmap
import os
import struct
from array import array
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

MAGIC = b"GGUF"
# Version 1 had 32-bit counts and was in use for some weeks of August 2023.
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MOST_DIMENSIONS = 4

# The specification's numbers of the types of values, with struct's letters for them.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class TensorEntry:
    """The position and encoding of a tensor.

    `shape` is in torch's order, the reverse of the file's order. `type` is the file's number of the encoding, one of
    `gguf.GGMLQuantizationType` unless it is newer than the package. `offset` counts from the start of the file.
    """

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class GGUFHeader:
    """All fields by key (strings, numbers, bools, lists of strings, arrays of numbers) and all tensors by name."""

    path: Path
    file_size: int
    fields: dict[str, Any]
    tensors: dict[str, TensorEntry]


def read_gguf_header(path: str | Path) -> GGUFHeader:
    """Reads the header of a file. The last header is cached, because a file's tokenizer and model both need it.

    Raises:
        ValueError: the file is missing, not a GGUF file, or truncated, or its counts exceed its size.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"{file}: no such file")
    stat = file.stat()
    if stat.st_size == 0:
        raise ValueError(f"{file}: empty")
    return _read(file, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=1)
def _read(file: Path, *version: int) -> GGUFHeader:
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _HeaderReader(file, content).header()


def is_gguf(path: str | Path) -> bool:
    """Returns whether a file starts like a GGUF file."""
    if not os.path.isfile(path):
        return False
    with open(path, "rb") as opened:
        return opened.read(len(MAGIC)) == MAGIC


class _HeaderReader:
    """Reads a file from its start. Checks before every read that the file is long enough."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.end = path, content, len(content)
        self.position = 0

    def header(self) -> GGUFHeader:
        if self.content[: len(MAGIC)] != MAGIC:
            raise ValueError(f"{self.path}: not a GGUF file")
        self.position = len(MAGIC)
        version = self.scalar("I", "the version")
        if version not in VERSIONS:
            if version & 0xFFFF == 0:
                raise ValueError(
                    f"{self.path}: a big-endian GGUF file, which is not supported: convert it to little-endian"
                )
            raise ValueError(
                f"{self.path}: GGUF version {version} is not supported, only {VERSIONS[0]} and {VERSIONS[1]}"
            )
        tensor_count, field_count = self.scalar("Q", "the number of tensors"), self.scalar("Q", "the number of fields")
        # The fewest bytes that one field or tensor takes: lengths and types, without text.
        self.check_count(field_count, 8 + 4 + 1, "fields")
        self.check_count(tensor_count, 8 + 4 + 4 + 8, "tensors")

        fields: dict[str, Any] = {}
        for _ in range(field_count):
            key = self.name("a key")
            if key in fields:
                raise ValueError(f"{self.path}: the key {key} appears twice")
            fields[key] = self.value(self.scalar("I", key), key)
        entries = [self.entry() for _ in range(tensor_count)]
        alignment = fields.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"{self.path}: general.alignment is {alignment!r}, not a power of two")
        start = -(-self.position // alignment) * alignment
        tensors: dict[str, TensorEntry] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise ValueError(f"{self.path}: the tensor {name} appears twice")
            if offset % alignment:
                raise ValueError(
                    f"{self.path}: damaged: the tensor {name} begins at byte {offset:,}, which {alignment} does not "
                    "divide (general.alignment)"
                )
            tensors[name] = TensorEntry(name, shape, kind, start + offset)
        return GGUFHeader(self.path, self.end, fields, tensors)

    def entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.name("a tensor's name")
        dimensions = self.scalar("I", name)
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"{self.path}: {name} has {dimensions} dimensions; at most {MOST_DIMENSIONS} are possible")
        shape = tuple(self.scalar("Q", name) for _ in range(dimensions))
        return name, shape[::-1], self.scalar("I", name), self.scalar("Q", name)

    def value(self, kind: int, key: str) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind], key)
        if kind == STRING:
            return self.string(key)
        if kind != ARRAY:
            raise ValueError(f"{self.path}: {key} has a value of the unknown type {kind}")
        element, count = self.scalar("I", key), self.scalar("Q", key)
        if element in SCALARS:
            letter = SCALARS[element]
            self.check_count(count, struct.calcsize(f"<{letter}"), f"values of {key}")
            return self.numbers(letter, count, key)
        if element == STRING:
            self.check_count(count, 8, f"values of {key}")
            return self.strings(count, key)
        raise ValueError(f"{self.path}: {key} is an array of the type {element}, which is not supported")

    def numbers(self, letter: str, count: int, what: str) -> array[Any]:
        """Reads an array of numbers, which takes as much memory as in the file. A list would take up to 40 times."""
        numbers = array("B" if letter == "?" else letter)
        size = count * numbers.itemsize
        if size > self.end - self.position:
            raise self.truncated(what)
        numbers.frombytes(self.content[self.position : self.position + size])
        self.position += size
        return numbers

    def scalar(self, letter: str, what: str) -> Any:
        return self.unpack(f"<{letter}", what)[0]

    def string(self, what: str) -> str:
        length = self.scalar("Q", what)
        if length > self.end - self.position:
            raise self.truncated(what)
        raw = self.content[self.position : self.position + length]
        self.position += length
        return self.decoded(raw, what)

    def strings(self, count: int, what: str) -> list[str]:
        """Reads an array of strings. A vocabulary has 100,000 strings, so this loop is written for speed."""
        content, end, position = self.content, self.end, self.position
        read_length = struct.Struct("<Q").unpack_from
        raw = []
        for _ in range(count):
            begin = position + 8
            if begin > end:
                raise self.truncated(what)
            position = begin + read_length(content, position)[0]
            if position > end:
                raise self.truncated(what)
            raw.append(content[begin:position])
        self.position = position
        return [self.decoded(text, what) for text in raw]

    def decoded(self, raw: bytes, what: str) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{self.path}: {what} is not UTF-8: {raw[:40]!r}") from None

    def name(self, what: str) -> str:
        """Reads a text that is safe in messages: a damaged text could hold line breaks or terminal control codes."""
        name = self.string(what)
        if not name.isprintable():
            raise ValueError(f"{self.path}: {what} is not printable: {name[:40]!r}")
        return name

    def unpack(self, layout: str, what: str) -> tuple[Any, ...]:
        size = struct.calcsize(layout)
        if size > self.end - self.position:
            raise self.truncated(what)
        values = struct.unpack_from(layout, self.content, self.position)
        self.position += size
        return values

    def check_count(self, count: int, least_bytes: int, what: str) -> None:
        """Checks that the rest of the file can hold `count` items of at least `least_bytes` each."""
        if count > (self.end - self.position) // least_bytes:
            raise ValueError(
                f"{self.path}: truncated, or damaged: it is said to hold {count:,} {what}, and has {self.end:,} bytes"
            )

    def truncated(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: truncated, or damaged: its {self.end:,} bytes end within {what}")
