"""Sources of text: what a person names in YAML, and an iterator over its documents that knows file and row.

Local files (jsonl, csv, tsv, parquet, text; plain, .gz or .zst) are read here, because an error has to name the file
and the row; everything else that `datasets` can load (hub ids, directories of `save_to_disk`) comes through `datasets`,
streamed, so that a slice of a huge set never lands on the disk whole.
"""

from __future__ import annotations

import codecs
import csv
import glob
import gzip
import io
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lightning_danube.data.documentation import ROLES, collect_documentation
from lightning_danube.durations import parse_tokens

DOCUMENTATION = "documentation:"
FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".raw": "text",
}


_PATTERN = re.compile(r"\{([^{}]+)\}")
"""A column's name inside a pattern."""


class Document(NamedTuple):
    """One text and where it stands: rows count from 1, as an editor shows them."""

    text: str
    file: str
    row: int


@dataclass(frozen=True)
class Source:
    """A source of documents.

    Args:
        path: "documentation:web" (or wiki, academic, synthetic, instruct; the embedded texts), a file, a directory or a
            glob of files, a directory written by `datasets` `save_to_disk`, or a hub id such as
            "HuggingFaceFW/fineweb-edu".
        text: the column that holds the text, or a pattern of several, such as "{question} {answer}"; of no meaning for
            plain text files.
        name: configuration of a hub data set, for example "sample-10BT".
        split: split of a hub data set.
        revision: commit or tag of a hub data set; state it, and the source can be made again later.
        separator: what ends a document inside a plain text file, for example "\\n" for one document a line. Without it
            a file is one document.
        max_tokens: stop after about so many tokens ("10B"): for hub sets larger than the run needs.
    """

    path: str
    text: str = "text"
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    separator: str | None = None
    max_tokens: int | str | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            object.__setattr__(self, "max_tokens", parse_tokens(self.max_tokens, "max_tokens"))
        if self.separator == "":
            raise ValueError('separator is empty: give what ends a document, for example "\\n", or leave it out')

    @property
    def is_documentation(self) -> bool:
        return self.path.startswith(DOCUMENTATION)

    @property
    def is_hub(self) -> bool:
        """An id like owner/name; a path that exists, or that is written as a path or a file, is local."""
        if self.is_documentation or os.path.exists(self.path):
            return False
        looks_local = self.path.startswith((".", "/", "~")) or _format(self.path) or glob.has_magic(self.path)
        return not looks_local and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", self.path) is not None


def local_files(name: str, source: Source, cache_dir: Path) -> list[str]:
    """Files of a local source, sorted. The embedded texts are collected first if they are not there yet.

    Raises:
        ValueError: nothing is there, or a file has no known format.
    """
    if source.is_documentation:
        role = source.path.removeprefix(DOCUMENTATION)
        if role not in ROLES:
            raise ValueError(
                f"source {name!r} asks for {source.path!r}: the embedded texts are "
                + ", ".join(DOCUMENTATION + known for known in ROLES)
            )
        return [str(collect_documentation(cache_dir)[role])]
    path = os.path.expanduser(source.path)
    if os.path.isdir(path):
        files = [str(file) for file in sorted(Path(path).rglob("*")) if file.is_file() and _format(file.name)]
        if not files:
            raise ValueError(
                f"source {name!r}: the directory {source.path} holds no file of a known format "
                f"({', '.join(sorted(FORMATS))}, plain or with .gz or .zst)"
            )
        return files
    files = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else [path]
    files = [file for file in files if os.path.isfile(file)]
    if not files:
        raise ValueError(f"source {name!r}: there is no file {source.path}")
    for file in files:
        if not _format(file):
            raise ValueError(
                f"source {name!r}: {file} has no known format ({', '.join(sorted(FORMATS))}, plain or with .gz or .zst)"
            )
    return files


def is_saved_dataset(source: Source) -> bool:
    """Whether the path is a directory that `datasets` wrote by `save_to_disk`."""
    return os.path.isfile(os.path.join(os.path.expanduser(source.path), "state.json"))


def read_documents(name: str, source: Source, cache_dir: Path) -> Iterator[Document]:
    """All documents of a source in a fixed order. Rows whose text is null or blank are left out.

    Raises:
        ValueError: with file and row, for bytes that are not UTF-8, a row that does not parse, a text that is missing
            or not a string; with the name of the source for what cannot be opened.
    """
    if source.is_hub or is_saved_dataset(source):
        yield from _read_with_datasets(name, source)
        return
    for file in local_files(name, source, cache_dir):
        kind = _format(file)
        if kind == "text":
            yield from _read_text(file, source.separator)
            continue
        for row, values in {"jsonl": _read_jsonl, "parquet": _read_parquet}.get(kind, _read_csv)(file):
            text = _text_of(values, source.text, f"{file}, row {row}")
            if text:
                yield Document(text, file, row)


def _format(path: str) -> str:
    stem, suffix = os.path.splitext(path)
    if suffix in (".gz", ".zst"):
        suffix = os.path.splitext(stem)[1]
    return FORMATS.get(suffix.lower(), "")


def _text_of(values: Any, column: str, where: str) -> str:
    """The text of a row, "" for one without any."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected an object with the column {column!r}, found {type(values).__name__}")
    if "{" in column:
        return _PATTERN.sub(lambda match: _text_of(values, match[1], where), column)
    if column not in values:
        raise ValueError(f"{where}: there is no column {column!r}, only {', '.join(map(str, values)) or 'none'}")
    text = values[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(f"{where}: column {column!r} holds {type(text).__name__}, not text")
    return text if text.strip() else ""


@contextmanager
def _open_bytes(file: str) -> Iterator[BinaryIO]:
    """Opens a plain or compressed file; damage in the compression names the file."""
    import zstandard

    try:
        with open(file, "rb") as raw:
            if file.endswith(".gz"):
                with gzip.open(raw) as unpacked:
                    yield io.BufferedReader(unpacked)
            elif file.endswith(".zst"):
                with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as unpacked:
                    yield io.BufferedReader(unpacked)
            else:
                yield raw
    except (EOFError, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise ValueError(f"{file} is not a whole compressed file ({error}): fetch it again") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: byte {error.start + 1} of the row (0x{line[error.start]:02x}) is not UTF-8: convert the file"
        ) from error


def _read_jsonl(file: str) -> Iterator[tuple[int, Any]]:
    with _open_bytes(file) as lines:
        for row, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            text = _decode(line, f"{file}, row {row}").removeprefix("\ufeff")
            if row == 1 and text.lstrip().startswith("["):
                yield from _read_json_array(file)
                return
            try:
                yield row, json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, row {row}: not JSON ({error.msg} at character {error.pos + 1})") from error


def _read_json_array(file: str) -> Iterator[tuple[int, Any]]:
    with _open_bytes(file) as raw:
        text = _decode(raw.read(), f"{file}, row 1").removeprefix("\ufeff")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}, row {error.lineno}: not JSON ({error.msg} at column {error.colno})") from error
    yield from enumerate(rows, start=1)


def _read_csv(file: str) -> Iterator[tuple[int, Any]]:
    limit = csv.field_size_limit(2**31 - 1)
    try:
        with _open_bytes(file) as raw:
            lines = (_decode(line, f"{file}, line {n}") for n, line in enumerate(raw, start=1))
            reader = csv.DictReader(lines, delimiter="\t" if _format(file) == "tsv" else ",", strict=True)
            try:
                for row, values in enumerate(reader, start=1):
                    if None in values:
                        raise ValueError(f"{file}, row {row}: more fields than the header's {len(values) - 1}")
                    yield row, values
            except csv.Error as error:
                raise ValueError(f"{file}, line {reader.line_num}: not CSV ({error})") from error
    finally:
        csv.field_size_limit(limit)


def _read_parquet(file: str) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    row += 1
                    yield row, values
    except (pa.ArrowException, OSError) as error:
        raise ValueError(
            f"{file} is not a whole parquet file, after row {row} ({str(error).splitlines()[0]})"
        ) from error


def _read_text(file: str, separator: str | None) -> Iterator[Document]:
    """Documents of a text file, read piece by piece; `row` is the document's number."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    buffer, number, offset = "", 0, 0
    with _open_bytes(file) as raw:
        while piece := raw.read(1 << 20):
            try:
                buffer += decoder.decode(piece)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file}, near byte {offset + error.start + 1}: not UTF-8: convert the file first"
                ) from error
            offset += len(piece)
            if separator:
                *whole, buffer = buffer.split(separator)
                for text in whole:
                    number += 1
                    if text.strip():
                        yield Document(text, file, number)
    try:
        buffer += decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} ends inside a character: not UTF-8, or cut off") from error
    if buffer.strip():
        yield Document(buffer.removeprefix("\ufeff"), file, number + 1)


def _read_with_datasets(name: str, source: Source) -> Iterator[Document]:
    import datasets

    where = source.path if source.name is None else f"{source.path} ({source.name})"
    try:
        rows: Any
        if is_saved_dataset(source):
            rows = datasets.load_from_disk(os.path.expanduser(source.path))
        else:
            rows = datasets.load_dataset(
                source.path, source.name, split=source.split, revision=source.revision, streaming=True
            )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(" .")
        raise ValueError(f"source {name!r}: {where} cannot be loaded ({reason})") from error
    for row, values in enumerate(rows, start=1):
        text = _text_of(values, source.text, f"source {name!r}: {where}, row {row}")
        if text:
            yield Document(text, where, row)
