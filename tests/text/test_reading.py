"""How the bytes of a file become rows: compression, line ends, quotation marks, and rows that cannot be read."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lightning_danube.text.reading import (
    BadRow,
    DamagedFile,
    Document,
    class_names_of,
    json_of,
    read_file,
    read_lines,
    read_rows,
)


def texts_of(path: Path, separator: str | None = None) -> list[str]:
    rows = list(read_file(str(path), "text", separator))
    assert all(isinstance(row, Document) for row in rows)
    return [row.text for row in rows if isinstance(row, Document)]


def compressed(content: bytes, window_log: int) -> bytes:
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=window_log, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(content) + compressor.flush()


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_a_zst_file_may_have_a_window_of_2_gib(tmp_path: Path, window_log: int) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(compressed(b'{"text": "x"}\n' * 3, window_log))
    assert zstandard.get_frame_parameters(path.read_bytes()).window_size == 1 << window_log
    assert texts_of(path) == ["x"] * 3


def test_a_zst_file_may_have_several_frames_and_frames_to_skip(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    skipped = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"notes"
    one, other = (zstandard.ZstdCompressor().compress(text.encode()) for text in ("one ", "other"))
    for content in (
        one + other,
        one + skipped + other,
        skipped + one + zstandard.ZstdCompressor().compress(b"") + other,
    ):
        path.write_bytes(content)
        assert texts_of(path) == ["one other"]


@pytest.mark.parametrize("lost", [1, 5, -4])
def test_a_zst_file_that_ends_too_early_or_too_late_is_damaged(tmp_path: Path, lost: int) -> None:
    path = tmp_path / "a.txt.zst"
    whole = zstandard.ZstdCompressor().compress(b"some words " * 9)
    path.write_bytes(whole[:-lost] if lost > 0 else whole + b"junk")
    with pytest.raises(DamagedFile, match=r"a\.txt\.zst is not a whole compressed file \(.*\): fetch it again"):
        texts_of(path)


def test_quotation_marks_in_tsv_are_text(tmp_path: Path) -> None:
    rows = [
        '"A beginning\tpos',
        "middle\tneg",
        'an end"\tneg',
        '"Good" he said\tpos',
        '"never closed\tpos',
        'a ""b\tneg',
    ]
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"{row}\n" for row in rows))
    expected = [
        (number, dict(zip(("text", "label"), row.split("\t"), strict=True))) for number, row in enumerate(rows, 1)
    ]
    assert list(read_rows(str(tmp_path / "a.tsv"))) == expected


def test_a_row_of_tsv_has_the_fields_of_its_header(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text('text\tlabel\n"over two\nlines"\tpos\nplain\t\n')
    (_, first), (_, second), (_, third) = read_rows(str(tmp_path / "a.tsv"))
    assert isinstance(first, BadRow) and first.cause == "not TSV" and first.row == 1
    assert (
        "row 1: fewer fields than the header's 2 (in .tsv, each line is a row, and quotation marks are text"
        in first.message
    )
    # The second line looks like a whole row. Only the refusal of the first one says that it is none.
    assert second == {"text": 'lines"', "label": "pos"} and third == {"text": "plain", "label": ""}


@pytest.mark.parametrize(
    ("content", "separator", "texts"),
    [
        ("first\r\n\r\nsecond\r\nline\r\n\r\nthird\r\n", "\n\n", ["first", "second\nline", "third\n"]),
        ("first\r\nsecond\r\n", "\n", ["first", "second"]),
        ("first\r\nsecond\n", None, ["first\nsecond\n"]),
        ("a\n---\r\nb\r\n---\nc", "\n---\n", ["a", "b", "c"]),
        # A separator with a carriage return is meant as it is.
        ("a\nb\r\nc", "\r\n", ["a\nb", "c"]),
        ("over\rwritten\nx", "\n", ["over\rwritten", "x"]),
        ("a+b+\r\nc", "b+\n", ["a+", "c"]),
    ],
)
def test_lines_of_text_end_as_on_windows_or_elsewhere(
    tmp_path: Path, content: str, separator: str | None, texts: list[str]
) -> None:
    (tmp_path / "a.txt").write_bytes(content.encode())
    assert texts_of(tmp_path / "a.txt", separator) == texts


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_rows_of_tables_end_as_on_windows_or_elsewhere(tmp_path: Path, suffix: str) -> None:
    gap = "\t" if suffix == "tsv" else ","
    for end in ("\n", "\r\n"):
        (tmp_path / f"a.{suffix}").write_bytes(f"text{gap}n{end}one{gap}1{end}{end}two{gap}2{end}".encode())
        assert [row for _, row in read_rows(str(tmp_path / f"a.{suffix}"))] == [
            {"text": "one", "n": "1"},
            {"text": "two", "n": "2"},
        ]
    (tmp_path / "q.csv").write_bytes(b'text,n\r\n"over two\r\nlines",1\r\n')
    assert [row["text"] for _, row in read_rows(str(tmp_path / "q.csv"))] == ["over two\nlines"]


LONG_NUMBER = '{"text": "x", "n": ' + "7" * 5000 + "}"
DEEP = '{"text": "x", "n": ' + "[" * 5000 + '"]"' + "]" * 5000 + "}"


@pytest.mark.parametrize(
    ("row", "reason"), [(LONG_NUMBER, "a whole number of more than 4,300 digits"), (DEEP, "nested too deep")]
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_a_row_of_json_that_python_does_not_read_is_a_bad_row(
    tmp_path: Path, row: str, reason: str, suffix: str
) -> None:
    path, good = tmp_path / f"a.{suffix}", '{"text": "good, [1] \\" good"}'
    path.write_text(f"[{good},\n {row} ,{good}]" if suffix == "json" else f"{good}\n{row}\n{good}\n")
    first, (number, bad), last = read_rows(str(path))
    assert first == (1, json.loads(good)) and last == (3, json.loads(good))
    assert number == 2 and bad == BadRow(str(path), 2, "not JSON", f"{path}, row 2: not JSON ({reason})")


def test_an_array_may_have_any_values_and_none(tmp_path: Path) -> None:
    for content in (" [ ] \n", '\ufeff[1, "a,]", null,\t{"b": [2]}\r\n]', "[[[]]]"):
        (tmp_path / "a.json").write_text(content)
        assert [row for _, row in read_rows(str(tmp_path / "a.json"))] == json.loads(content.removeprefix("\ufeff"))


def test_a_key_with_half_a_surrogate_pair_can_be_told(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"te\\ud800t": "x"}\n')
    (bad,) = read_file(str(tmp_path / "a.jsonl"), "text", None)
    assert isinstance(bad, BadRow) and bad.message.endswith("row 1: there is no column 'text', only te\\ud800t")
    assert bad.message.encode()


def test_json_without_a_file_is_told_by_its_place() -> None:
    assert json_of('{"a": 1}', "f", 3, "here") == {"a": 1}
    assert json_of("{", "f", 3, "here") == BadRow(
        "f", 3, "not JSON", "here: not JSON (Expecting property name enclosed in double quotes at character 2)"
    )


def test_lines_are_all_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\n three \n \n".encode())
    assert list(read_lines(str(tmp_path / "a.txt"))) == ["one", "", " three ", " "]
    (tmp_path / "b.txt").write_bytes(b"one\n\xff")
    with pytest.raises(ValueError, match=r"b\.txt, line 2: byte 1 of the row \(0xff\) is not UTF-8"):
        list(read_lines(str(tmp_path / "b.txt")))


def test_two_columns_of_one_name_in_parquet_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DamagedFile, match=r"a\.parquet: two columns are called 'text': rename one of them"):
        list(read_rows(str(tmp_path / "a.parquet")))


def test_a_parquet_file_may_name_its_classes(tmp_path: Path) -> None:
    features: dict[str, Any] = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["neg", "pos"], "_type": "ClassLabel"},
    }
    table = pa.Table.from_pylist([{"text": "x", "label": 1}])
    pq.write_table(table, tmp_path / "plain.parquet")
    described = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": described}), tmp_path / "a.parquet")
    assert class_names_of(str(tmp_path / "a.parquet")) == {"label": ["neg", "pos"]}
    assert class_names_of(str(tmp_path / "plain.parquet")) == class_names_of(str(tmp_path / "a.csv")) == {}
