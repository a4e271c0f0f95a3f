"""What `prepare` hands to whom, how it counts, and what it says meanwhile."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lightning_danube.text.corpora import Source
from lightning_danube.text.quality import Quality
from lightning_danube.tokens import preparation
from lightning_danube.tokens.preparation import Preparation, _duration, _Progress, open_or_prepare, prepare
from lightning_danube.tokens.shards import ShardFacts, TokenShards, is_held_out
from lightning_danube.tokens.tokenizer import DocumentTokenizer

TEXTS = [f"dücument {number} of many, with some words in it" for number in range(60)]


@pytest.fixture(scope="module")
def tokenizer() -> DocumentTokenizer:
    return DocumentTokenizer("danube-small")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return Source(str(path))


Make = Callable[..., TokenShards]


@pytest.fixture
def make(tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setattr(preparation, "UNIT_BYTES", 500)

    def made(source: Source, **changes: Any) -> TokenShards:
        options: dict[str, Any] = {"held_out": 0.2, "cache_dir": tmp_path / "cache", "processes": 1, **changes}
        shards, _ = open_or_prepare("src", source, tokenizer, **options)
        assert isinstance(shards, TokenShards)
        return shards

    return made


class Pool:
    """Does all work at once in this process, and notes what it was asked for."""

    asked: list[int]

    def __init__(self, processes: int) -> None:
        Pool.asked.append(processes)

    def submit(self, function: Callable[..., Any], *args: Any) -> Any:
        value = function(*args)
        return SimpleNamespace(result=lambda: value)

    def map(self, *arguments: Any) -> Any:
        return map(*arguments)

    def shutdown(self, **_: Any) -> None:
        pass


@pytest.mark.parametrize(("processes", "worth", "asked"), [(1, 1, []), (3, 1, [3]), (3, 1 << 23, [])])
def test_as_many_processes_work_as_are_asked_for_if_it_is_worth_it(
    make: Make, source: Source, monkeypatch: pytest.MonkeyPatch, processes: int, worth: int, asked: list[int]
) -> None:
    Pool.asked = []
    monkeypatch.setattr(preparation, "WorkerPool", Pool)
    monkeypatch.setattr(preparation, "WORTH_PROCESSES", worth)
    make(source, processes=processes)
    assert Pool.asked == asked


def test_the_report_counts_documents_tokens_and_bytes(make: Make, source: Source, tokenizer: DocumentTokenizer) -> None:
    shards = make(source)
    report = json.loads((shards.directory / "report.json").read_text())
    tokens = sum(map(len, tokenizer.encode_documents(TEXTS)))
    assert (report["documents"], report["documents_read"], report["tokens"]) == (60, 60, tokens)
    size = sum(len(text.encode()) for text in TEXTS)
    assert size > sum(map(len, TEXTS)) and report["bytes_per_token"] == pytest.approx(size / tokens, abs=1e-4)
    held_out = sum(is_held_out(text, 0.2) for text in TEXTS)
    assert [shards.counts(split).documents for split in ("train", "validation")] == [60 - held_out, held_out]


def test_columns_and_separators_of_a_source_are_obeyed(make: Make, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "a", "body": "the body of it"}) + "\n")
    (tmp_path / "c.txt").write_text("one;two;three;four")
    for source, documents in (
        (Source(str(tmp_path / "b.jsonl"), text="body"), ["the body of it"]),
        (Source(str(tmp_path / "c.txt"), separator=";"), ["one", "two", "three", "four"]),
    ):
        shards = make(source, held_out=0.5)
        found = []
        for split in ("train", "validation"):
            tokens = shards.tokens(split)
            ends = np.flatnonzero(tokens.read(0, len(tokens)) == 2) + 1
            found += [
                DocumentTokenizer("danube-small").text(ids) for ids in np.split(tokens.read(0, len(tokens)), ends)
            ]
        assert sorted(filter(None, found)) == sorted(documents)


@pytest.mark.parametrize("limit", [1, 100, 101, 500, 10_000])
def test_the_document_that_reaches_the_limit_is_the_last(
    make: Make, source: Source, tokenizer: DocumentTokenizer, limit: int
) -> None:
    shards = make(Source(source.path, max_tokens=limit))
    lengths = list(map(len, tokenizer.encode_documents(TEXTS)))
    kept = next((n for n in range(1, 60) if sum(lengths[:n]) >= limit), 60)
    assert shards.meta["counts"]["documents"] == kept
    assert shards.meta["counts"]["tokens"] == sum(lengths[:kept])


def test_parts_share_the_units_and_the_last_one_joins(
    tmp_path: Path, source: Source, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "UNIT_BYTES", 500)
    made: list[list[int]] = []
    make_unit = preparation.make_unit

    def noted(job: Any, number: int, rows: Any) -> tuple[int, int]:
        made[-1].append(number)
        return make_unit(job, number, rows)

    monkeypatch.setattr(preparation, "make_unit", noted)
    options: dict[str, Any] = {"held_out": 0.2, "quality": Quality(), "cache_dir": tmp_path / "cache"}
    for part in (2, 3, 1):
        made.append([])
        assert not list((tmp_path / "cache").glob("shards/src-*"))
        prepare({"src": source}, tokenizer, processes=1, part=(part, 3), **options)
    units = sum(map(len, made))
    assert made == [list(range(first, units, 3)) for first in (1, 2, 0)] and units > 6
    assert list((tmp_path / "cache").glob("shards/src-*"))


def test_new_shards_are_verified_once(make: Make, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    verified = []
    monkeypatch.setattr(TokenShards, "verify", lambda self: verified.append(self.directory))
    shards = make(source)
    assert verified == [shards.directory]
    make(source)
    assert verified == [shards.directory]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89.4, "89 s"), (90, "2 min"), (5399, "90 min"), (5400, "1.5 h")]
)
def test_durations_have_the_unit_that_fits(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


def test_the_time_left_follows_from_the_bytes_that_are_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(preparation.time, "monotonic", lambda: clock.now)
    source: Any = SimpleNamespace(facts=SimpleNamespace(name="web"), weight=900)
    other: Any = SimpleNamespace(facts=SimpleNamespace(name="wiki"), weight=100)
    progress = _Progress([source, other])
    clock.now += 29
    progress.add(source, 1, 10, 50)
    assert capsys.readouterr().err == ""
    clock.now += 21
    progress.add(source, 9, 90, 150)
    # A fifth of 1,000 bytes took 50 seconds, so the rest takes 200.
    expected = "tokenizing web: 20%, 10 documents, 100 tokens (0 documents/s, 2 tokens/s), 3 min left\n"
    assert capsys.readouterr().err == expected
    clock.now += 29
    progress.add(other, 1, 1, 1)
    assert capsys.readouterr().err == ""
    progress.close()


def test_compressed_files_have_units_of_their_uncompressed_size(
    tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    monkeypatch.setattr(preparation, "UNIT_BYTES", 1000)
    content = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    facts = ShardFacts("src", Source(str(tmp_path / "a.jsonl.gz")), tokenizer, 0.1, Quality(), tmp_path)
    made = Preparation(tmp_path / "shards/x", facts)
    made.open(None)

    def no_pool() -> Any:
        raise AssertionError("one small file needs no processes")

    units = made.plan(no_pool)
    assert sum(span.weight for unit in units for span in unit) == len(content)
    assert len(units) >= len(content) // 1200
    assert made.plan(no_pool) == units  # the second time from its file


def test_rows_of_one_number_in_two_files_are_two_documents(make: Make, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(f"the text of {name}")
    shards = make(Source(str(folder)), held_out=0.5)
    counts = shards.meta["counts"]
    assert (counts["documents_read"], counts["pieces_of_long_documents"]) == (3, 0)
