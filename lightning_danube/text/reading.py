"""Reads documents from files, a whole file or one span at a time, in bounded memory. Errors name file and row.

A *span* is the part of a file that one process reads: bytes [start, stop) of the uncompressed content, or row groups of
a parquet file. `spans` cuts a file at row starts, so every row is in exactly one span. An unreadable row is yielded as
a `BadRow` among the documents, which the caller can refuse or set aside. If a file as a whole is damaged, `DamagedFile`
is raised.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

from lightning_danube.files import STRICT_JSON, parse_json, why_not_json

LONGEST_DOCUMENT = 1 << 20
"""Bytes. A longer text is cut at white space into several documents."""
LONGEST_ROW = 1 << 26
"""Bytes of one line of jsonl or csv. A longer line is a bad row, because reading it could take unlimited memory."""
LONGEST_ARRAY = 1 << 28
"""Bytes of a file that is one JSON array. Such a file cannot be read in parts."""
_BLOCK = 1 << 19

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
READ_AS = {"text": 2, "csv": 2, "tsv": 2}
"""Format → version of the rules by which its bytes become texts, 1 for other formats. Shards of an older version are
made again."""
_COMPRESSIONS = (".gz", ".zst")
_COMPRESSED_BLOCK = 1 << 12
"""Bytes of a .zst file that are decompressed at once. Four of them can stand for 128 KiB."""
_PATTERN = re.compile(r"\{([^{}]+)\}")
"""Matches a column's name inside a pattern such as "{question} {answer}"."""


class Document(NamedTuple):
    """One text with its file and row. Rows count from 1, as in an editor."""

    text: str
    file: str
    row: int


class BadRow(NamedTuple):
    """A row without a usable text. `cause` is a category to count; `message` names file, row and what to do."""

    file: str
    row: int
    cause: str
    message: str


class DamagedFile(ValueError):
    """Raised for a file that cannot be read, even if bad rows are skipped."""


class Span(NamedTuple):
    """A part of a file that starts at row `row`. `weight` is its amount of work, in bytes."""

    file: str
    start: int
    stop: int
    row: int
    weight: int


def format_of(path: str) -> str:
    """Returns the format that a file name stands for, "" for an unknown format."""
    stem, suffix = os.path.splitext(path)
    if suffix in _COMPRESSIONS:
        suffix = os.path.splitext(stem)[1]
    return FORMATS.get(suffix.lower(), "")


def listed(names: Iterable[Any]) -> str:
    """Returns the names of columns for a message, "none" without names. Half a surrogate pair is written as \\ud800."""
    return ", ".join(map(str, names)).encode("utf-8", "backslashreplace").decode() or "none"


def read_file(file: str, column: str, separator: str | None) -> Iterator[Document | BadRow]:
    """Yields the documents and bad rows of a whole file."""
    for span in spans(file, separator, 1 << 62):
        yield from read_span(span, column, separator)


def read_span(span: Span, column: str, separator: str | None) -> Iterator[Document | BadRow]:
    """Yields the documents and bad rows of a span in order.

    Rows whose text is null or blank are left out. A text longer than `LONGEST_DOCUMENT` is cut into several documents.

    Raises:
        DamagedFile: the file as a whole cannot be read.
    """
    if format_of(span.file) == "text":
        yield from _read_text(span, separator)
        return
    columns = _PATTERN.findall(column) if "{" in column else [column]
    for row, values in _rows_of_span(span, columns):
        yield from documents_of(values, column, span.file, row, f"{span.file}, row {row}")


def read_rows(file: str) -> Iterator[tuple[int, Any]]:
    """Yields number and content (a mapping or a `BadRow`) of each row of a jsonl, csv, tsv or parquet file.

    Raises:
        DamagedFile: the file as a whole cannot be read, or is plain text.
    """
    if format_of(file) == "text":
        raise DamagedFile(f"{file} is plain text, which has no columns: give jsonl, csv, tsv or parquet")
    for span in spans(file, None, 1 << 62):
        yield from _rows_of_span(span, None)


def has_separator(file: str, separator: str) -> bool:
    """Returns whether a separator ends a document of a plain text file. Reads up to the first one.

    Raises:
        DamagedFile: the file cannot be read.
    """
    with open_bytes(file) as content:
        pieces = _pieces(content, separator, 1)
        return any(following > position + len(data) for position, _, data, following in pieces)


def read_lines(file: str) -> Iterator[str]:
    """Yields every line of a plain text file without its line end. Blank lines count.

    Raises:
        DamagedFile: the file cannot be read to its end.
        ValueError: a line is not UTF-8, or too long.
    """
    with open_bytes(file) as content:
        for line in _Lines(content):
            yield line.removesuffix("\n")


def _rows_of_span(span: Span, columns: list[str] | None) -> Iterator[tuple[int, Any]]:
    """Returns the rows of a span with at least the named columns, or with all columns if `columns` is None."""
    kind = format_of(span.file)
    if kind == "parquet":
        return _parquet_rows(span, columns)
    if kind == "jsonl":
        return _json_array_rows(span) if _is_json_array(span.file) else _jsonl_rows(span)
    return _csv_rows(span)


def documents_of(values: Any, column: str, file: str, row: int, where: str) -> Iterator[Document | BadRow]:
    """Yields the documents of one row: none if its text is blank, several if the text is long."""
    found = values if isinstance(values, BadRow) else text_of(values, column, file, row, where)
    if isinstance(found, BadRow):
        yield found
    elif found.strip():
        yield from (Document(piece, file, row) for piece in cut(found))


def id_of(values: Mapping[str, Any]) -> str | int | None:
    """Returns the column `id` of a row, by which a user knows the row."""
    found = values.get("id")
    return listed([found]) if isinstance(found, str) else found if isinstance(found, int) else None


def text_of(values: Any, column: str, file: str, row: int, where: str) -> str | BadRow:
    """Returns the text of a row, "" for a null text, or a `BadRow`."""
    if not isinstance(values, Mapping):
        message = f"{where}: expected an object with the column {column!r}, found {type(values).__name__}"
        return BadRow(file, row, "not an object", message)
    if "{" in column:
        parts = {name: text_of(values, name, file, row, where) for name in _PATTERN.findall(column)}
        bad = next((part for part in parts.values() if isinstance(part, BadRow)), None)
        return bad or _PATTERN.sub(lambda match: str(parts[match[1]]), column)
    if column not in values:
        message = f"{where}: there is no column {column!r}, only {listed(values)}"
        return BadRow(file, row, "no such column", message)
    text = values[column]
    if text is None:
        return ""
    if not isinstance(text, str):
        return BadRow(file, row, "not text", f"{where}: column {column!r} holds {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"{where}: column {column!r} holds half a surrogate pair (\\u{ord(text[error.start]):04x}), not text"
        return BadRow(file, row, "not UTF-8", message)
    return text


def cut(text: str, longest: int | None = None) -> list[str]:
    """Cuts a text after white space into pieces of at most `longest` bytes (`LONGEST_DOCUMENT` by default)."""
    longest = longest or LONGEST_DOCUMENT
    if len(text) * 4 <= longest:
        return [text]
    data, pieces, at = text.encode(), [], 0
    while len(data) - at > longest:
        end = _place_to_cut(data, at, longest)
        pieces.append(data[at:end].decode())
        at = end
    pieces.append(data[at:].decode())
    return [piece for piece in pieces if piece.strip()]


def _place_to_cut(data: bytes, at: int, longest: int) -> int:
    """Returns the end of the piece that starts at `at`.

    The end is after the last white space in the second half of the piece. Without white space, it is between two
    characters.
    """
    end = at + longest
    behind = max(data.rfind(mark, at + longest // 2, end) for mark in (b" ", b"\n", b"\t")) + 1
    if behind:
        return behind
    while (data[end] & 0xC0) == 0x80:  # inside a character
        end -= 1
    return end


# --- bytes ------------------------------------------------------------------------------------------------------------


class _Cursor:
    """A compressed file that stays open where the last span ended, because the next span is mostly further on."""

    def __init__(self) -> None:
        self.file, self.stream, self.position = "", io.BytesIO(), 0


_cursor = _Cursor()


class Bytes:
    """The content of a plain or compressed file from `start` on. `position` counts uncompressed bytes."""

    def __init__(self, file: str, start: int) -> None:
        self.file, self.position = file, start
        if not file.endswith(_COMPRESSIONS):
            self._stream: Any = open(file, "rb")  # noqa: SIM115
            self._stream.seek(start)
            return
        if _cursor.file == file and _cursor.position <= start:
            self._stream, self.position = _cursor.stream, _cursor.position
        else:
            self._stream, self.position = _decompressed(file), 0
        _cursor.file = ""
        while self.position < start:
            self.read(min(_BLOCK, start - self.position))

    def read(self, size: int) -> bytes:
        data: bytes = self._stream.read(size)
        self.position += len(data)
        return data

    def readline(self, limit: int) -> bytes:
        line: bytes = self._stream.readline(limit)
        self.position += len(line)
        return line

    def skip_line(self) -> None:
        while (line := self.readline(_BLOCK)) and not line.endswith(b"\n"):
            pass

    def close(self) -> None:
        if self.file.endswith(_COMPRESSIONS):
            _cursor.file, _cursor.stream, _cursor.position = self.file, self._stream, self.position
        else:
            self._stream.close()


def _decompressed(file: str) -> Any:
    if not os.path.getsize(file):
        # gzip would read such a file as an empty text.
        raise EOFError("it has 0 bytes")
    return gzip.open(file) if file.endswith(".gz") else io.BufferedReader(_Zstd(file), _BLOCK)


class _Zstd(io.RawIOBase):
    """The content of a .zst file with windows of up to 2 GiB, as `zstd --long=31` writes them.

    Unlike the stream reader of `zstandard`, this class notices that a file ends inside a frame.
    """

    def __init__(self, file: str) -> None:
        import zstandard

        self._file = open(file, "rb")  # noqa: SIM115
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
        self._damage = zstandard.ZstdError
        self._frame: Any = None
        self._compressed, self._content = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._content:
            data = self._compressed or self._file.read(_COMPRESSED_BLOCK)
            if not data:
                if self._frame is not None:
                    raise EOFError("it ends inside a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._content = memoryview(self._frame.decompress(data))
            except self._damage as error:
                raise EOFError(str(error)) from error
            self._compressed = self._frame.unused_data if self._frame.eof else b""
            self._frame = None if self._frame.eof else self._frame
        size = min(len(buffer), len(self._content))
        buffer[:size], self._content = self._content[:size], self._content[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def open_bytes(file: str, start: int = 0) -> Iterator[Bytes]:
    """Opens a file at byte `start`. Errors from damaged compression name the file.

    Raises:
        DamagedFile: the file cannot be read to its end.
    """
    opened = None
    try:
        opened = Bytes(file, start)
        yield opened
        opened.close()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DamagedFile(f"{file} is not a whole compressed file ({error}): fetch it again") from error
    except OSError as error:
        if error.errno is None:
            raise DamagedFile(f"{file} is not a whole compressed file ({error}): fetch it again") from error
        raise DamagedFile(f"{file} cannot be read: {error.strerror or error}") from error


# --- spans ------------------------------------------------------------------------------------------------------------


def spans(file: str, separator: str | None, size: int) -> list[Span]:
    """Cuts a file at row starts into spans of about `size` bytes. Reads the file once.

    Raises:
        DamagedFile: the file cannot be read to its end.
    """
    kind = format_of(file)
    if kind == "parquet":
        return _parquet_spans(file, size)
    if kind == "jsonl" and _is_json_array(file):
        with open_bytes(file) as content:
            while content.position <= LONGEST_ARRAY and content.read(_BLOCK):
                pass
            if content.position > LONGEST_ARRAY:
                raise DamagedFile(
                    f"{file} is one JSON array of more than {LONGEST_ARRAY >> 20} MiB, which has to be read at once: "
                    "write it as one object a line (.jsonl)"
                )
            return [Span(file, 0, content.position, 1, content.position)]
    begins = {"text": _text_begins, "jsonl": _line_begins}.get(kind, _csv_begins)(file, separator, size)
    return [Span(file, start, stop, row, stop - start) for (start, row), (stop, _) in pairwise(begins)]


def _line_begins(file: str, separator: str | None, size: int) -> list[tuple[int, int]]:
    """Returns (offset, row) of the first line start at or after every `size` bytes, and of the file's end."""
    begins, row, goal = [(0, 1)], 1, size
    with open_bytes(file) as content:
        position = 0
        while block := content.read(_BLOCK):
            while behind := block.find(b"\n", max(0, goal - 1 - position)) + 1:
                begins.append((position + behind, row + block.count(b"\n", 0, behind)))
                goal = begins[-1][0] + size
            row += block.count(b"\n")
            position += len(block)
    if begins[-1][0] == position:
        begins.pop()
    return [*begins, (position, row)]


def _text_begins(file: str, separator: str | None, size: int) -> list[tuple[int, int]]:
    begins, end = [(0, 1)], 0
    with open_bytes(file) as content:
        for position, number, _, end in _pieces(content, separator, 1):  # noqa: B007
            if position >= begins[-1][0] + size:
                begins.append((position, number))
    return [*begins, (end, 0)]


def _csv_begins(file: str, separator: str | None, size: int) -> list[tuple[int, int]]:
    _csv_header(file, os.stat(file).st_mtime_ns)  # raises an error for a header that cannot be read
    with open_bytes(file) as content:
        reader = _csv_reader(file, _Lines(content))
        _first_fields(reader)
        begins, row = [(content.position, 1)], 1
        while True:
            start = content.position
            try:
                values = next(reader)
            except StopIteration:
                break
            except (csv.Error, BadLine):
                values = ["bad"]
            if start >= begins[-1][0] + size:
                begins.append((start, row))
            row += bool(values)
        return [*begins, (content.position, row)]


def _parquet_spans(file: str, size: int) -> list[Span]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise DamagedFile(f"{file} is not a whole parquet file, after row 0 ({str(error).splitlines()[0]})") from error
    found: list[Span] = []
    start, first, row, weight = 0, 1, 1, 0
    for group in range(metadata.num_row_groups):
        row += metadata.row_group(group).num_rows
        weight += metadata.row_group(group).total_byte_size
        if weight >= size or group == metadata.num_row_groups - 1:
            found.append(Span(file, start, group + 1, first, weight))
            start, first, weight = group + 1, row, 0
    return found


# --- rows -------------------------------------------------------------------------------------------------------------


class BadLine(ValueError):
    """A csv line that cannot be decoded or is too long, with the message for the user."""


def _jsonl_rows(span: Span) -> Iterator[tuple[int, Any]]:
    file, row = span.file, span.row - 1
    with open_bytes(file, span.start) as content:
        while content.position < span.stop and (line := content.readline(LONGEST_ROW + 1)):
            row += 1
            where = f"{file}, row {row}"
            if len(line) > LONGEST_ROW:
                content.skip_line()
                yield row, _too_long(file, row, where)
                continue
            if not line.strip():
                continue
            text = _decode(line, where)
            if text is None:
                yield row, BadRow(file, row, "not UTF-8", _not_utf8(line, where))
                continue
            yield row, json_of(text.removeprefix("\ufeff"), file, row, where)


def json_of(text: str, file: str, row: int, where: str) -> Any:
    """Returns the value of a row of JSON, or a `BadRow`."""
    try:
        return STRICT_JSON.decode(text)
    except (ValueError, RecursionError) as error:
        place = f" at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        return BadRow(file, row, "not JSON", f"{where}: not JSON ({why_not_json(error)}{place})")


def _is_json_array(file: str) -> bool:
    return _begins_with_bracket(file, os.stat(file).st_mtime_ns)


@lru_cache(64)
def _begins_with_bracket(file: str, modified: int) -> bool:
    with open_bytes(file) as content:
        begin = content.readline(_BLOCK).removeprefix(b"\xef\xbb\xbf").lstrip()
    return begin.startswith(b"[")


def _json_array_rows(span: Span) -> Iterator[tuple[int, Any]]:
    with open_bytes(span.file) as content:
        data = content.read(span.stop)
    text = _decode(data, span.file)
    if text is None:
        raise DamagedFile(_not_utf8(data, f"{span.file}, row 1"))
    at, row, decode = text.index("[") + 1, 0, STRICT_JSON.raw_decode
    while (at := _behind_space(text, at)) < len(text) and (row or text[at] != "]"):
        row += 1
        values: Any
        try:
            values, at = decode(text, at)
        except json.JSONDecodeError as error:
            # Where the next row begins is not known behind a syntax error.
            raise _damaged_array(span.file, row, text, error.pos, error.msg) from error
        except (ValueError, RecursionError) as error:
            message = f"{span.file}, row {row}: not JSON ({why_not_json(error)})"
            values, at = BadRow(span.file, row, "not JSON", message), _end_of_element(text, at)
        yield row, values
        at = _behind_space(text, at)
        if text[at : at + 1] != ",":
            break
        at += 1
    if text[at : at + 1] != "]":
        raise _damaged_array(span.file, row, text, at, "Expecting ',' or ']'")
    if (behind := _behind_space(text, at + 1)) < len(text):
        raise _damaged_array(span.file, row, text, behind, "Extra data behind the array")


_SPACE = re.compile(r"[ \t\n\r]*")
_JSON_MARK = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)
"""Matches a text of JSON, or a mark outside texts."""


def _behind_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    assert match is not None
    return match.end()


def _end_of_element(text: str, at: int) -> int:
    """Returns the end of the array's element that begins at `at`, without reading its values."""
    depth = 0
    for mark in _JSON_MARK.finditer(text, at):
        depth += (mark[0] in "[{") - (mark[0] in "]}")
        if depth < 0 or (depth == 0 and mark[0] == ","):
            return mark.start()
    return len(text)


def _damaged_array(file: str, row: int, text: str, at: int, reason: str) -> DamagedFile:
    line = text.count("\n", 0, at) + 1
    column = at - text.rfind("\n", 0, at)
    return DamagedFile(f"{file}, row {row}: not JSON ({reason} at line {line}, column {column})")


class _Lines:
    """Decoded lines for the csv reader. After a bad line, reading continues with the next line."""

    def __init__(self, content: Bytes) -> None:
        self.content, self.number = content, 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self.content.readline(LONGEST_ROW + 1)
        if not line:
            raise StopIteration
        self.number += 1
        where = f"{self.content.file}, line {self.number}"
        if len(line) > LONGEST_ROW:
            self.content.skip_line()
            raise BadLine(_too_long(self.content.file, self.number, where).message)
        text = _decode(line, where)
        if text is None:
            raise BadLine(_not_utf8(line, where))
        text = f"{text[:-2]}\n" if text.endswith("\r\n") else text
        return text.removeprefix("\ufeff") if self.number == 1 else text


def _csv_reader(file: str, lines: _Lines) -> Iterator[list[str]]:
    if format_of(file) == "tsv":
        return map(_fields_of_tsv, lines)
    csv.field_size_limit(LONGEST_ROW)
    return csv.reader(lines, strict=True)


def _fields_of_tsv(line: str) -> list[str]:
    """Returns the fields of a line. Quotation marks are text, as IANA's definition of the format has it."""
    line = line.removesuffix("\n")
    return line.split("\t") if line else []


def _first_fields(reader: Iterator[list[str]]) -> list[str]:
    return next(filter(None, reader), [])


@lru_cache(64)
def _csv_header(file: str, modified: int) -> tuple[list[str], int]:
    """Returns the column names and the number of the header's last line."""
    with open_bytes(file) as content:
        lines = _Lines(content)
        try:
            header = _first_fields(_csv_reader(file, lines))
        except (csv.Error, BadLine) as error:
            raise DamagedFile(f"{file}, line 1: the header is not CSV ({error})") from error
    if not header:
        raise DamagedFile(f"{file} is empty: its first line has to name the columns")
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise DamagedFile(f"{file}, line {lines.number}: two columns are called {twice[0]!r}: rename one of them")
    return header, lines.number


def _csv_rows(span: Span) -> Iterator[tuple[int, Any]]:
    file = span.file
    header, first_line = _csv_header(file, os.stat(file).st_mtime_ns)
    is_tsv = format_of(file) == "tsv"
    with open_bytes(file, span.start) as content:
        lines = _Lines(content)
        # Messages have line numbers in the first span only: later spans would need another pass over the file.
        lines.number = first_line if span.row == 1 else 1 << 40
        reader, row = _csv_reader(file, lines), span.row - 1
        while content.position < span.stop:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except (csv.Error, BadLine) as error:
                row += 1
                place = f"line {lines.number}" if lines.number < 1 << 40 else f"row {row}"
                if isinstance(error, BadLine):
                    cause = "too long" if "longer than" in str(error) else "not UTF-8"
                    message = re.sub(r"line \d+", place, str(error), count=1)
                else:
                    cause, message = "not CSV", f"{file}, {place}: not CSV ({error})"
                yield row, BadRow(file, row, cause, message)
                continue
            if not fields:
                continue
            row += 1
            if len(fields) > len(header) or (is_tsv and len(fields) < len(header)):
                what = "more" if len(fields) > len(header) else "fewer"
                hint = " (in .tsv, each line is a row, and quotation marks are text)" if is_tsv else ""
                message = f"{file}, row {row}: {what} fields than the header's {len(header)}{hint}"
                yield row, BadRow(file, row, "not TSV" if is_tsv else "not CSV", message)
            else:
                yield row, dict.fromkeys(header) | dict(zip(header, fields, strict=False))


def _parquet_rows(span: Span, columns: list[str] | None) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = span.row - 1
    try:
        with pq.ParquetFile(span.file, buffer_size=_BLOCK, pre_buffer=False) as parquet:
            known = parquet.schema_arrow.names
            wanted = known if columns is None else columns
            if twice := [name for name in wanted if known.count(name) > 1]:
                raise DamagedFile(f"{span.file}: two columns are called {twice[0]!r}: rename one of them")
            missing = [name for name in wanted if name not in known]
            if missing:
                raise DamagedFile(
                    f"{span.file}, row {span.row}: there is no column {missing[0]!r}, only {', '.join(known)}"
                )
            groups = list(range(span.start, span.stop))
            for batch in parquet.iter_batches(batch_size=64, row_groups=groups, columns=wanted):
                for values in batch.to_pylist():
                    row += 1
                    yield row, values
    except (pa.ArrowException, OSError) as error:
        raise DamagedFile(
            f"{span.file} is not a whole parquet file, after row {row} ({str(error).splitlines()[0]})"
        ) from error


def class_names_of(file: str) -> dict[str, list[str]]:
    """Returns column → names of its classes, which `datasets` writes into the schema of a parquet file."""
    if format_of(file) != "parquet":
        return {}
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        described = (pq.read_schema(file).metadata or {}).get(b"huggingface", b"{}")
        features = parse_json(described, file)["info"]["features"]
        return {column: list(one["names"]) for column, one in features.items() if one.get("_type") == "ClassLabel"}
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # reading the rows tells what is wrong with the file


def _read_text(span: Span, separator: str | None) -> Iterator[Document | BadRow]:
    """Yields the documents of a text file. `row` is the document's number."""
    with open_bytes(span.file, span.start) as content:
        for position, number, data, end in _pieces(content, separator, span.row, span.stop):
            try:
                text = data.decode("utf-8")
            except UnicodeDecodeError as error:
                message = f"{span.file}, near byte {position + error.start + 1}: not UTF-8: convert the file first"
                if error.end == len(data) and error.reason == "unexpected end of data" and end == position + len(data):
                    message = f"{span.file} ends inside a character: not UTF-8, or cut off"
                yield BadRow(span.file, number, "not UTF-8", message)
                continue
            if position == 0:
                text = text.removeprefix("\ufeff")
            text = text.replace("\r\n", "\n")
            if text.strip():
                yield Document(text, span.file, number)


def _pieces(
    content: Bytes, separator: str | None, number: int, stop: int = 1 << 62
) -> Iterator[tuple[int, int, bytes, int]]:
    """Yields (position, number of the document, content, position of the next piece) of each piece of a text file.

    A piece ends at a separator or at `LONGEST_DOCUMENT` bytes. Its end depends only on its start, so reading can start
    at any piece. A line end of the separator is "\\n" or "\\r\\n" in the file.
    """
    mark = _Separator(separator)
    position, buffer, at, ended = content.position, b"", 0, False
    while True:
        if not ended and len(buffer) - at <= LONGEST_DOCUMENT + mark.longest:
            block = content.read(min(_BLOCK, stop - content.position))
            ended = not block
            buffer, at = buffer[at:] + block, 0
            mark.has_windows_lines = b"\r\n" in buffer
            continue
        if at >= len(buffer):
            return
        end, after = mark.find(buffer, at, LONGEST_DOCUMENT)
        following = number
        if end >= 0:
            following = number + 1
        elif len(buffer) - at <= LONGEST_DOCUMENT:
            after = end = len(buffer)
        else:
            after = end = _place_to_cut(buffer, at, LONGEST_DOCUMENT)
        yield position, number, buffer[at:end], position + after - at
        position, number, at = position + after - at, following, after


class _Separator:
    """Finds the text that ends a document. A separator with "\\r" is found as it is, any other with both line ends."""

    def __init__(self, separator: str | None) -> None:
        self._plain = (separator or "").encode()
        lines = b"" if b"\r" in self._plain else self._plain
        self._any_lines = re.compile(re.escape(lines).replace(b"\\\n", b"\\r?\\n"))
        self.longest = len(self._plain) + lines.count(b"\n")
        """Most bytes that the separator takes."""
        self.has_windows_lines = False
        """Whether the bytes that are searched have a "\\r\\n". Without one, the plain search is exact and fast."""

    def find(self, data: bytes, at: int, longest: int) -> tuple[int, int]:
        """Returns (start, stop) of the first separator that starts within `longest` bytes behind `at`, or (-1, -1)."""
        if not self._plain:
            return -1, -1
        if self.has_windows_lines and self.longest > len(self._plain):
            match = self._any_lines.search(data, at, at + longest + self.longest)
            start, stop = match.span() if match else (-1, -1)
            return (start, stop) if start - at <= longest else (-1, -1)
        start = data.find(self._plain, at, at + longest + len(self._plain))
        return start, start + len(self._plain)


def _decode(data: bytes, where: str) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _not_utf8(data: bytes, where: str) -> str:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"{where}: byte {error.start + 1} of the row (0x{data[error.start]:02x}) is not UTF-8: convert the file"
    raise AssertionError("called for bytes that are not UTF-8")


def _too_long(file: str, row: int, where: str) -> BadRow:
    message = f"{where}: longer than {LONGEST_ROW >> 20} MiB, the most a row may have: cut its text into several rows"
    return BadRow(file, row, "too long", message)
