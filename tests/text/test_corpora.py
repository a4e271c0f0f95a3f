import csv
import gzip
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from lightning_danube.text import corpora
from lightning_danube.text.corpora import Document, Source, read_documents

ROWS = [{"text": "First, with a comma and ü.", "id": 1}, {"text": 'Second "quoted"\nover two lines.', "id": 2}]


def read(path: Path | str, **options: object) -> list[Document]:
    return list(read_documents("src", Source(str(path), **options), Path("unused")))  # type: ignore[arg-type]


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def write_jsonl(path: Path) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n")


def write_json_array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=1))


def write_csv(path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["text", "id"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


@pytest.mark.parametrize(
    ("name", "write", "compression"),
    [
        *itertools.product(["a.jsonl"], [write_jsonl], ["", ".gz", ".zst"]),
        *itertools.product(["a.json"], [write_json_array], ["", ".gz", ".zst"]),
        *itertools.product(["a.csv"], [write_csv], ["", ".gz", ".zst"]),
        ("a.parquet", write_parquet, ""),
    ],
)
def test_every_format_gives_the_same_documents(
    tmp_path: Path, name: str, write: Callable[[Path], None], compression: str
) -> None:
    plain = tmp_path / name
    write(plain)
    path = plain
    if compression:
        path = tmp_path / (name + compression)
        data = plain.read_bytes()
        path.write_bytes(gzip.compress(data) if compression == ".gz" else zstandard.ZstdCompressor().compress(data))
    assert read(path) == [Document(str(row["text"]), str(path), n) for n, row in enumerate(ROWS, 1)]


def test_text_files_are_one_document_or_split(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("One\n\nTwo\n<|end|>Three\n<|end|> \n")
    assert [d.text for d in read(path)] == ["One\n\nTwo\n<|end|>Three\n<|end|> \n"]
    assert [d.text for d in read(path, separator="<|end|>")] == ["One\n\nTwo\n", "Three\n"]
    assert [(d.text, d.row) for d in read(path, separator="\n")][:2] == [("One", 1), ("Two", 3)]


@pytest.mark.parametrize(
    ("content", "separator", "is_there"),
    [
        ("one<end>two", "<end>", True),
        ("one<end>", "<end>", True),  # also where no second document follows
        ("one\r\n\r\ntwo", "\n\n", True),
        ("one\ntwo", "\n\n", False),
        ("one\ntwo", "\\n", False),  # a backslash and an n, as a shell passes them
        ("a" * (1 << 20) + "|||", "|||", True),
    ],
)
def test_a_separator_that_occurs_nowhere_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, separator: str, is_there: bool
) -> None:
    (tmp_path / "a.txt").write_bytes(content.encode())
    read(tmp_path, separator=separator)
    told = f"source 'src': the separator {separator!r} occurs nowhere in {tmp_path}, so each file is one document"
    assert capsys.readouterr().err.count(told) == (not is_there)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(f"three{separator}four".encode()))
    read(tmp_path, separator=separator)
    assert capsys.readouterr().err == "", "one file that has it is enough"


def test_separators_and_characters_may_lie_across_pieces(tmp_path: Path) -> None:
    """Files are read in pieces of 512 KiB; this one has a two-byte character and a separator on the border."""
    path = tmp_path / "a.txt"
    first = "a" * ((1 << 19) - 1) + "ü"
    path.write_text(first + "|||" + "b" * (1 << 19) + "|||c")
    assert [d.text for d in read(path, separator="|||")] == [first, "b" * (1 << 19), "c"]


def test_directories_and_globs_are_read_in_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/c.txt", "notes.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.text for d in read(tmp_path)] == ["a.txt", "b.txt", "sub/c.txt"]
    assert [d.text for d in read(tmp_path / "*.txt")] == ["a.txt", "b.txt"]


def test_a_directory_is_read_with_its_links_and_without_hidden_files_and_cards(tmp_path: Path) -> None:
    data, disk = tmp_path / "data", tmp_path / "disk"
    for name in ("part0/a.txt", "part0/.ipynb_checkpoints/a.txt", "._b.txt", "README.md", "part0/config.json"):
        write(data / name, name)
    write(disk / "b.txt", "linked")
    (data / "part1").symlink_to(disk)
    (data / "part0" / "c.txt").symlink_to(disk / "b.txt")
    (disk / "above").symlink_to(data)  # would be followed without end
    assert [document.text for document in read(data)] == ["part0/a.txt", "linked", "linked"]
    assert [document.text for document in read(data / "README.md")] == ["README.md"]
    (data / "gone.txt").symlink_to(disk / "nothing.txt")
    with pytest.raises(
        ValueError, match=r"source 'src': .*gone\.txt is a link to a file that does not exist: remove or"
    ):
        read(data)


def test_a_path_that_exists_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "news [old]"
    write(folder / "a [1].txt", "brackets")
    write(folder / "a1.txt", "no brackets")
    assert [document.text for document in read(folder / "a [1].txt")] == ["brackets"]
    assert [document.text for document in read(folder / "a?.txt")] == ["no brackets"]
    assert [document.text for document in read(folder / "*.txt")] == ["brackets", "no brackets"]


def test_what_datasets_saved_is_read_by_datasets(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert [d.text for d in read(tmp_path / "saved")] == [row["text"] for row in ROWS]


def test_of_several_saved_splits_the_source_names_one(tmp_path: Path) -> None:
    import datasets

    splits = {name: datasets.Dataset.from_list([{"text": f"a {name} text"}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert [d.text for d in read(tmp_path / "saved")] == ["a train text"]
    assert [d.text for d in read(tmp_path / "saved", split="test")] == ["a test text"]
    with pytest.raises(
        ValueError, match=r"source 'src': .*saved has no split 'dev', only train, test: name one with split"
    ):
        read(tmp_path / "saved", split="dev")
    (tmp_path / "saved" / "dataset_dict.json").unlink()
    with pytest.raises(ValueError, match="no file of a known format"):
        read(tmp_path / "saved")


def test_columns_are_joined_by_a_pattern(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "Why?", "a": "Because {so}."}\n{"q": "How?", "a": null}\n')
    assert [d.text for d in read(path, text="Q: {q}\nA: {a}")] == ["Q: Why?\nA: Because {so}.", "Q: How?\nA: "]
    with pytest.raises(ValueError, match=r"row 1: there is no column 'b', only q, a"):
        read(path, text="{q} {b}")


def test_empty_rows_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n\n{"text": null}\n{"text": "  "}\n{"text": "x"}\n')
    assert read(path) == [Document("x", str(path), 5)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl, row 2: not JSON \(Expecting value at character \d+\)"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"a\.jsonl, row 2: there is no column 'text', only body"),
        ("a.jsonl", b'{"text": 5}\n', r"a\.jsonl, row 1: column 'text' holds int, not text"),
        ("a.jsonl", b'"text"\n', r"a\.jsonl, row 1: expected an object with the column 'text', found str"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, row 2: byte 11 of the row \(0xff\) is not UTF-8"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', r"a\.jsonl, row 1: not JSON \(the key 'text' appears twice\)"),
        ("a.jsonl", b'{"text": "a", "m": [{"k": 1, "k": 1}]}\n', r"row 1: not JSON \(the key 'k' appears twice\)"),
        (
            "a.json",
            b'[{"text": "a"}, {"text": "b", "x": 1, "x": 2}]',
            r"a\.json, row 2: not JSON \(the key 'x' appears twice",
        ),
        ("a.json", b'[{"text": "a"},\n{"text" "b"}]', r"a\.json, row 2: not JSON \(.* at line 2, column 9\)"),
        ("a.json", b'[{"text": "a"}, {"text": "b"}', r"a\.json, row 2: not JSON \(Expecting ',' or '\]' at line 1"),
        ("a.json", b'[{"text": "a"},]', r"a\.json, row 2: not JSON \(Expecting value"),
        ("a.json", b'[{"text": "a"}]\n[]', r"a\.json, row 1: not JSON \(Extra data behind the array at line 2"),
        ("a.csv", b"text,id\na,1\nb,2,3\n", r"a\.csv, row 2: more fields than the header's 2"),
        ("a.csv", b"text,id,text\na,1,b\n", r"a\.csv, line 1: two columns are called 'text': rename one of them"),
        ("a.csv", b"", r"a\.csv is empty: its first line has to name the columns"),
        ("a.tsv", b"\n\n", r"a\.tsv is empty: its first line has to name the columns"),
        ("a.tsv", b"text\tid\na\t1\nb\n", r"a\.tsv, row 2: fewer fields than the header's 2 \(in \.tsv, each line is"),
        ("a.csv", b'text,id\n"a,1\n', r"a\.csv, line \d: not CSV \(unexpected end of data\)"),
        ("a.csv", b"text\na\nb\xff\n", r"a\.csv, line 3: byte 2 of the row \(0xff\) is not UTF-8"),
        ("a.csv", b"body,id\na,1\n", r"a\.csv, row 1: there is no column 'text', only body, id"),
        ("a.txt", b"abc\xffdef", r"a\.txt, near byte 4: not UTF-8"),
        ("a.txt", b"abc\xc3", r"a\.txt ends inside a character"),
        ("a.parquet", b"PAR1 and nothing", r"a\.parquet is not a whole parquet file, after row 0"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 100, mtime=0)[:-12],
            r"a\.jsonl\.gz is not a whole compressed file",
        ),
        ("a.jsonl.gz", b"no gzip at all", r"a\.jsonl\.gz is not a whole compressed file"),
        ("a.jsonl.zst", b"no zstd at all", r"a\.jsonl\.zst is not a whole compressed file"),
        ("a.jsonl.gz", b"", r"a\.jsonl\.gz is not a whole compressed file \(it has 0 bytes\): fetch it again"),
        ("a.txt.zst", b"", r"a\.txt\.zst is not a whole compressed file \(it has 0 bytes\)"),
        ("a.csv.gz", gzip.compress(b"", mtime=0), r"a\.csv\.gz is empty: its first line has to name the columns"),
    ],
)
def test_damage_is_named_with_file_and_row(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_truncated_zst_file_is_not_a_short_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.zst"
    text = "".join(json.dumps({"text": f"document {n} {n * 7919}"}) + "\n" for n in range(50_000)).encode()
    path.write_bytes(zstandard.ZstdCompressor().compress(text)[:-5000])
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst"):
        read(path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("./missing.jsonl", r"source 'src': there is no file \./missing\.jsonl"),
        ("missing.jsonl", r"source 'src': there is no file missing\.jsonl"),
        ("no/such/*.txt", r"source 'src': there is no file no/such/\*\.txt"),
        (
            "documentation:poems",
            r"source 'src' asks for 'documentation:poems': the embedded texts are documentation:web",
        ),
        ("nobody/nothing", r"source 'src': nobody/nothing cannot be loaded"),
    ],
)
def test_what_is_not_there_is_named(path: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(path)


def test_unknown_formats_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"a\.docx has no known format"):
        read(tmp_path / "a.docx")
    with pytest.raises(ValueError, match="holds no file of a known format"):
        read(tmp_path)


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="separator is empty"):
        Source("a.txt", separator="")
    with pytest.raises(ValueError, match="max_tokens is 'many': give a positive number of tokens"):
        Source("a.txt", max_tokens="many")


def test_a_hub_data_set_is_asked_for_as_the_source_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[object] = []

    def load(*args: object, **options: object) -> list[dict[str, str]]:
        asked.append((args, options))
        return [{"words": "one"}, {"words": ""}, {"words": "three"}]

    monkeypatch.setattr(corpora, "ask_hub", lambda source: asked.append(source.path))
    monkeypatch.setattr(datasets, "load_dataset", load)
    documents = read("owner/name", text="words", name="sample", split="test", revision="abc")
    there = "owner/name (sample), split test"
    assert documents == [Document("one", there, 1), Document("three", there, 3)]
    asked_datasets = (("owner/name", "sample"), {"split": "test", "revision": "abc", "streaming": True})
    assert asked == ["owner/name", asked_datasets]


def test_a_hub_out_of_reach_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from huggingface_hub import HfApi

    asked = []

    def refuse(self: HfApi, path: str, **options: object) -> None:
        asked.append((path, options["revision"]))
        raise OSError("Name or service not known")

    monkeypatch.setattr(HfApi, "dataset_info", refuse)
    monkeypatch.setattr(datasets, "load_dataset", None)
    message = r"source .src.: owner/name cannot be loaded \(the hub is out of reach: Name or service not known\)"
    with pytest.raises(ValueError, match=message):
        read("owner/name", revision="abc")
    assert asked == [("owner/name", "abc")]


def test_what_lies_on_disk_is_no_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Source("owner/name").is_hub
    (tmp_path / "owner/name").mkdir(parents=True)
    (tmp_path / "owner/name/a.txt").write_text("here")
    assert not Source("owner/name").is_hub
    assert Source("owner").is_hub is False and Source("owners").is_hub
    assert [document.text for document in read("owner/name")] == ["here"]
    # A misspelt name in a directory that exists is not a hub id, as for weights and tokenizers.
    for path in ("owner/nam", "./owner/other", "~/owner", "texts/a.jsonl", "texts/*", "documentation:web", "a/b/c"):
        assert not Source(path).is_hub, path


def test_files_of_a_glob_are_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import glob

    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(name)
    found = glob.glob

    def shuffled(pattern: str, *, recursive: bool) -> list[str]:
        return sorted(found(pattern, recursive=recursive), reverse=True)

    monkeypatch.setattr(glob, "glob", shuffled)
    assert [document.text for document in read(tmp_path / "*.txt")] == ["a", "b", "c"]


def test_a_row_that_is_no_text_is_refused_also_from_a_stream(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list([{"n": 1}, {"n": 2}]).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"source 'src': .*saved, row 1: column 'n' holds int, not text"):
        read(tmp_path / "saved", text="n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_more_files_than_may_be_open_are_read(tmp_path: Path) -> None:
    import resource

    for number in range(300):
        (tmp_path / f"{number:03}.txt").write_text(f"text {number}\n")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    handle = os.dup(0)  # the lowest number that is free
    os.close(handle)
    resource.setrlimit(resource.RLIMIT_NOFILE, (handle + 20, before[1]))
    try:
        documents = list(read_documents("src", Source(str(tmp_path)), tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert [document.text for document in documents] == [f"text {number}\n" for number in range(300)]


def test_hub_files_are_those_of_the_configuration_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local directory with the layout of a hub data set: configurations in the card, parquet files below it."""
    monkeypatch.setattr(corpora, "ask_hub", lambda source: None)
    for name in ("a/train-0", "a/train-1", "a/test-0", "b/train-0"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"text": [name]}), tmp_path / f"{name}.parquet")
    card = "\n".join(
        f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n"
        + (f"  - split: test\n    path: {name}/test-*" if name == "a" else "")
        for name in ("a", "b")
    )
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{card}\n---\n")

    def found(**options: Any) -> list[str]:
        files = corpora.hub_files("web", Source(str(tmp_path), **options))
        return [str(Path(file).relative_to(tmp_path)) for file in files]

    assert found(name="a") == ["a/train-0.parquet", "a/train-1.parquet"]
    assert found(name="a", split="test") == ["a/test-0.parquet"]
    assert found(name="b") == ["b/train-0.parquet"]
    with pytest.raises(ValueError, match=r"source 'web': .* \(b\) has no split 'test', only train"):
        found(name="b", split="test")
    (tmp_path / "b" / "train-0.parquet").rename(tmp_path / "b" / "train-0.arrow")
    with pytest.raises(ValueError, match=r"source 'web': .*train-0.arrow has no known format \(.csv, "):
        found(name="b")
    with pytest.raises(ValueError, match=r"source 'web': .* \(c\) cannot be loaded \(.*'c' not found"):
        found(name="c")
