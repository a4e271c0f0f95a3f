"""The spans of a file together hold each row once, wherever the file is cut and in whatever order they are read."""

import csv
import gzip
import io
import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lightning_danube.text import reading
from lightning_danube.text.reading import BadRow, Document, Span, read_span, spans

TEXTS = ["first", "ü" * 9, "", "two words", " ", "x" * 33, 'a "quoted" one', "é", "the last but one", "end"]
SEPARATOR = "|~|"
Row = tuple[str, int]


def content_of(name: str) -> tuple[bytes, list[Row]]:
    """The content of a file, and its texts with their rows. Blank lines lie between the rows."""
    rows = [(text, row) for row, text in enumerate(TEXTS, start=1)]
    if name == "jsonl":
        lines = [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
        lines[3:3] = ["", " "]
        numbered = list(enumerate(lines, start=1))
        rows = [(json.loads(line)["text"], row) for row, line in numbered if line.strip()]
        return ("\n".join(lines) + "\n").encode(), kept(rows)
    if name == "tsv":
        lines = ["n\ttext", *(f"{row}\t{text}" for text, row in rows)]
        lines[4:4] = [""]
        return ("\r\n".join(lines) + "\r\n").encode(), kept(rows)
    if name == "csv":
        file = io.StringIO(newline="")
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        writer.writerow(["n", "text"])
        rows = [(text.replace(" ", "\n") if text.strip() else text, row) for text, row in rows]
        for text, row in rows:
            writer.writerow([row, text])
            file.write("\n" if row % 4 == 0 else "")
        return file.getvalue().encode(), kept(rows)
    if name == "txt":
        return SEPARATOR.join(TEXTS).encode(), kept(rows)
    sink = io.BytesIO()
    table = pa.Table.from_pylist([{"n": row, "text": text} for text, row in rows])
    with pq.ParquetWriter(sink, table.schema) as parquet:
        for start, size in ((0, 1), (1, 4), (5, 2), (7, 3)):
            parquet.write_table(table.slice(start, size))
    return sink.getvalue(), kept(rows)


def kept(rows: list[Row]) -> list[Row]:
    return [(text, row) for text, row in rows if text.strip()]


def read(span: Span) -> list[Row]:
    documents: list[Document | BadRow] = list(read_span(span, "text", SEPARATOR))
    assert all(isinstance(document, Document) for document in documents)
    return [(document.text, document.row) for document in documents if isinstance(document, Document)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv.zst", "a.txt", "a.txt.gz", "a.parquet"])
def test_spans_of_any_size_hold_each_row_once(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_BLOCK", 16)  # so that rows lie across blocks
    path = tmp_path / name
    content, expected = content_of(name.split(".")[1])
    compress = {".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}.get(path.suffix, bytes)
    path.write_bytes(compress(content))
    numbers = set()
    for size in (1, 2, 3, 5, 7, 13, 16, 17, 31, 48, 64, 100, 500, 5000):
        parts = spans(str(path), SEPARATOR, size)
        assert [row for part in parts for row in read(part)] == expected, size
        backwards = [read(part) for part in reversed(parts)]
        assert [row for rows in reversed(backwards) for row in rows] == expected, size
        assert all(one.stop == other.start for one, other in pairwise(parts))
        if path.suffix != ".parquet":
            assert all(part.weight == part.stop - part.start for part in parts)
            assert all(part.weight >= size for part in parts[:-1])
            assert parts[-1].stop == len(content)
        numbers.add(len(parts))
    # A span begins at the first row behind its size, so the smallest spans have one row each.
    assert max(numbers) >= (4 if path.suffix == ".parquet" else len(TEXTS)) and min(numbers) == 1


@pytest.mark.parametrize("separator", ["\n\n", "\n", "~\n"])
def test_spans_end_at_separators_with_line_ends_of_both_kinds(
    separator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "_BLOCK", 16)
    windows = separator.replace("\n", "\r\n")
    texts = [text for text in TEXTS if text.strip()]
    content = "".join(text + (windows if row % 3 else separator) for row, text in enumerate(texts))
    (tmp_path / "a.txt").write_bytes(content.encode())
    for size in (1, 7, 16, 33, 5000):
        parts = spans(str(tmp_path / "a.txt"), separator, size)
        found = [row.text for part in parts for row in read_span(part, "text", separator) if isinstance(row, Document)]
        assert found == texts, size
        assert parts[-1].stop == len(content.encode())


def test_a_byte_order_mark_belongs_to_no_text_and_no_column(tmp_path: Path) -> None:
    mark = "\ufeff".encode()
    for name, content in {"a.txt": b"one", "b.jsonl": b'{"text": "one"}\n', "c.csv": b"text\none\n"}.items():
        (tmp_path / name).write_bytes(mark + content)
        (span,) = spans(str(tmp_path / name), None, 1 << 20)
        assert read(span) == [("one", 1)]


def test_a_text_is_cut_behind_white_space_by_bytes_not_by_characters() -> None:
    text = "üü " * 30
    pieces = reading.cut(text, 40)
    assert "".join(pieces) == text
    assert all(20 < len(piece.encode()) <= 40 and piece.endswith(" ") for piece in pieces[:-1])
    assert reading.cut("ü" * 30, 40) == ["ü" * 20, "ü" * 10]
    # 40 bytes are one piece, 41 are two.
    assert [len(piece) for piece in reading.cut("a" * 40, 40)] == [40]
    assert [len(piece) for piece in reading.cut("a" * 41, 40)] == [40, 1]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.txt"])
def test_a_row_that_begins_at_the_size_begins_a_span(name: str, tmp_path: Path) -> None:
    row = {"a.jsonl": b'{"text": "x"}\n', "a.csv": b"x,y,z\n", "a.txt": b"xyz|~|"}[name]
    head = b"text,b,c\n" if name == "a.csv" else b""
    (tmp_path / name).write_bytes(head + row * 6)
    parts = spans(str(tmp_path / name), SEPARATOR, 2 * len(row))
    assert [part.weight for part in parts] == [2 * len(row)] * 3
    assert [part.row for part in parts] == [1, 3, 5]
