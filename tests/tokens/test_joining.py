"""Units become the shards: nothing is copied that need not be, a killed join goes on, and all parts count together."""

import errno
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_danube.text.corpora import Source
from lightning_danube.text.quality import Quality
from lightning_danube.tokens import preparation, units
from lightning_danube.tokens.preparation import open_or_prepare, prepare
from lightning_danube.tokens.shards import SPLITS, TokenShards, is_held_out
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from tests.token_files import noting

TEXTS = [f"text {number} of many, with some words in it" for number in range(80)]
Make = Callable[..., TokenShards]


@pytest.fixture(scope="module")
def tokenizer() -> DocumentTokenizer:
    return DocumentTokenizer("danube-small")


def write(path: Path, texts: list[str]) -> Source:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Source(str(path))


@pytest.fixture
def make(tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes shards of units of about ten documents."""
    monkeypatch.setattr(preparation, "UNIT_BYTES", 600)

    def made(source: Source, cache: str, **changes: Any) -> TokenShards:
        options: dict[str, Any] = {"held_out": 0.2, "cache_dir": tmp_path / cache, "processes": 1, **changes}
        shards, _ = open_or_prepare("src", source, tokenizer, **options)
        assert isinstance(shards, TokenShards)
        return shards

    return made


def content(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir() if file.name != "report.json"}


def check(shards: TokenShards, texts: list[str], tokenizer: DocumentTokenizer) -> None:
    """The shards hold these texts in order, and the counts of their tokens."""
    shards.verify()
    for split in SPLITS:
        own = [text for text in texts if is_held_out(text, 0.2) == (split == "validation")]
        stream = shards.tokens(split)
        assert stream.read(0, len(stream)).tolist() == np.concatenate(tokenizer.encode_documents(own)).tolist()
        assert shards.counts(split).documents == len(own)
        assert shards.token_counts(split).tolist() == stream.token_counts().tolist()


def test_the_files_of_the_units_are_the_shards(
    make: Make, tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    linked: set[int] = set()
    link = preparation.link_or_copy
    monkeypatch.setattr(preparation, "link_or_copy", noting(link, lambda path, to: linked.add(path.stat().st_ino)))
    shards = make(write(tmp_path / "a.jsonl", TEXTS), "one")
    check(shards, TEXTS, tokenizer)
    files = sorted(shards.directory.glob("*.arrow"))
    assert len(files) > 8 and linked == {file.stat().st_ino for file in files}
    assert [path.name for path in shards.directory.parent.iterdir()] == [shards.directory.name]


def test_a_file_system_without_links_gets_copies(
    make: Make, tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    expected = content(make(source, "one").directory)

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    number = errno.EPERM
    assert content(make(source, "two").directory) == expected
    number = errno.EIO
    with pytest.raises(OSError, match="nput/output error"):
        make(source, "three")


def test_a_killed_join_goes_on_where_it_was(
    make: Make, tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [text for text in TEXTS for text in (text, TEXTS[0])]  # each unit has a copy of the first text
    source, quality = write(tmp_path / "a.jsonl", texts), Quality(deduplicate="exact")
    undisturbed = make(source, "one", quality=quality)
    check(undisturbed, TEXTS, tokenizer)
    assert undisturbed.meta["counts"]["duplicates"] == {"exact": 80, "near": 0}
    write_kept, asked = preparation.write_kept, list[int]()

    def fails_at_the_third(job: Any, number: int, keep: Any) -> None:
        asked.append(number)
        if len(asked) == 3:
            raise KeyboardInterrupt
        write_kept(job, number, keep)

    monkeypatch.setattr(preparation, "write_kept", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        make(source, "two", quality=quality)
    (building,) = (tmp_path / "two" / "shards").glob(".src-*.building")
    before = {path: path.stat().st_ino for path in building.glob("kept/*/*")}
    assert len({path.parent for path in before}) == 2
    inodes: list[int] = []
    link = preparation.link_or_copy
    monkeypatch.setattr(preparation, "link_or_copy", noting(link, lambda path, to: inodes.append(path.stat().st_ino)))
    monkeypatch.setattr(preparation, "make_unit", lambda *_: pytest.fail("a unit is made again"))
    written: list[int] = []
    writers = units._writers
    monkeypatch.setattr(units, "_writers", noting(writers, lambda job, number, to: written.append(number)))
    shards = make(source, "two", quality=quality)
    assert content(shards.directory) == content(undisturbed.directory)
    assert written and not {int(path.parent.name) for path in before} & set(written)
    assert {ino for path, ino in before.items() if path.suffix == ".arrow"} <= set(inodes)


def test_parts_count_the_tokens_of_all_parts(
    make: Make, tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, each of four parts would make as many units as are needed in all."""
    texts = [f"{number} and some words that make a document longer" for number in range(400)]
    source = Source(write(tmp_path / "a.jsonl", texts).path, max_tokens=2000)
    one = make(source, "one")
    assert 2000 <= one.meta["counts"]["tokens"] < 2040
    made: list[int] = []
    make_unit = preparation.make_unit

    def noted(job: Any, number: int, rows: Any) -> tuple[int, int]:
        made.append(number)
        return make_unit(job, number, rows)

    monkeypatch.setattr(preparation, "make_unit", noted)
    options: dict[str, Any] = {"held_out": 0.2, "quality": Quality(), "cache_dir": tmp_path / "parts", "processes": 1}
    for part in (4, 2, 3, 1):
        prepare({"src": source}, tokenizer, part=(part, 4), **options)
    (directory,) = (tmp_path / "parts" / "shards").glob("src-*")
    assert content(directory) == content(one.directory)
    needed = len(list(one.directory.glob("train-*.arrow")))
    assert needed <= len(made) <= needed + 4 < 4 * needed


def test_parts_that_stopped_too_early_are_named_and_go_on(
    make: Make, tmp_path: Path, tokenizer: DocumentTokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """The units of the first part have far more tokens than the others, so that it estimates those too high."""
    drawn = random.Random(0)
    dense, plain = "".join(drawn.choices("xqzjkvwy", k=50)), " the" * 11
    texts = [f"{number:05d}" + (dense if number // 9 % 3 == 0 else plain) for number in range(600)]
    source = Source(write(tmp_path / "a.jsonl", texts).path, max_tokens=4000)
    one = make(source, "one")
    options: dict[str, Any] = {"held_out": 0.2, "quality": Quality(), "cache_dir": tmp_path / "parts", "processes": 1}
    rounds = 0
    while not (found := list((tmp_path / "parts" / "shards").glob("src-*"))):
        for part in (1, 2, 3):
            prepare({"src": source}, tokenizer, part=(part, 3), **options)
        rounds += 1
        assert rounds < 10
    assert rounds > 1
    assert content(found[0]) == content(one.directory)
    assert "src: part 3 of 3 is made; " in (told := capsys.readouterr().err) and " left to --shard 1/3" in told


def test_a_source_that_is_too_large_is_refused_before_any_work(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "a.jsonl", TEXTS)
    size = Path(source.path).stat().st_size
    monkeypatch.setattr(preparation, "MOST_TOKENS", size // 4 - 1)
    monkeypatch.setattr(preparation, "make_unit", lambda *_: pytest.fail("a unit is made"))
    message = (
        rf"source 'src' has about {size // 4:,} tokens, more than the {size // 4 - 1:,} of a source that this engine "
        "prepares: use prepare --engine datatrove, or set its max_tokens"
    )
    with pytest.raises(ValueError, match=message):
        make(source, "one")
    monkeypatch.undo()
    assert make(Source(source.path, max_tokens=100), "two").meta["counts"]["tokens"] >= 100


def test_a_streamed_source_is_refused_by_its_limit(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "is_streamed", lambda source: True)
    monkeypatch.setattr(preparation, "read_stream", lambda *_: pytest.fail("the stream is read"))
    source = Source(write(tmp_path / "a.jsonl", TEXTS).path, max_tokens="2T")
    with pytest.raises(ValueError, match=r"has about 2,000,000,000,000 tokens, more than the 1,000,000,000,000 of"):
        make(source, "one")
