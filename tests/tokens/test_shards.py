import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_danube.text.corpora import Source
from lightning_danube.text.quality import Filters, Quality
from lightning_danube.tokens import preparation
from lightning_danube.tokens.preparation import open_or_prepare
from lightning_danube.tokens.shards import TokenShards, is_held_out
from lightning_danube.tokens.tokenizer import DocumentTokenizer

Make = Callable[..., TokenShards]
TEXTS = [f"Document number {n} is about {n * n} things; it has {'many ' * (n % 7)}words." for n in range(400)]


@pytest.fixture(scope="module")
def tokenizer() -> DocumentTokenizer:
    return DocumentTokenizer("danube-small")


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return Source(str(path))


@pytest.fixture
def make(tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes the shards of a source in a cache of its own."""

    def made(source: Source, cache: str = "cache", *, unit_bytes: int = 1 << 22, processes: int = 1) -> TokenShards:
        monkeypatch.setattr(preparation, "UNIT_BYTES", unit_bytes)
        monkeypatch.setattr(preparation, "WORTH_PROCESSES", 1)
        options: dict[str, Any] = {"held_out": 0.1, "cache_dir": tmp_path / cache, "processes": processes}
        shards, _ = open_or_prepare("src", source, tokenizer, **options)
        assert isinstance(shards, TokenShards)
        return shards

    return made


def test_shards_hold_every_document_once_in_order(make: Make, source: Source, tokenizer: DocumentTokenizer) -> None:
    shards = make(source)
    for split, held_out in (("train", False), ("validation", True)):
        expected = tokenizer.encode_documents([text for text in TEXTS if is_held_out(text, 0.1) is held_out])
        stream = shards.tokens(split)
        assert stream.read(0, len(stream)).tolist() == np.concatenate(expected).tolist()
        assert shards.counts(split).documents == len(expected)
        assert shards.counts(split).tokens == len(stream)
    # 400 documents at 10 %: the binomial's standard deviation is 6.
    assert 20 <= (shards.counts("validation").documents or 0) <= 60


def test_they_are_ordinary_files_of_datasets_in_16_bit(
    make: Make, source: Source, tokenizer: DocumentTokenizer
) -> None:
    import datasets

    rows = datasets.Dataset.from_file(str(make(source).directory / "train-00000.arrow"))
    assert rows.features["input_ids"].feature.dtype == "uint16"
    first = next(text for text in TEXTS if not is_held_out(text, 0.1))
    assert rows[0]["input_ids"] == tokenizer.encode_documents([first])[0].tolist()


@pytest.mark.parametrize("context_length", [7, 64, 1000])
def test_rows_cover_the_stream_across_files(make: Make, source: Source, context_length: int) -> None:
    shards = make(source, unit_bytes=2000)
    stream = shards.tokens("train")
    assert len(list(shards.directory.glob("train-*.arrow"))) > 3
    everything = stream.read(0, len(stream))
    rows = [stream.row(n, context_length) for n in range(stream.rows(context_length))]
    assert all(len(row) == context_length + 1 for row in rows)
    covered = len(rows) * context_length
    assert np.concatenate([row[:-1] for row in rows]).tolist() == everything[:covered].tolist()
    assert np.concatenate([row[1:] for row in rows]).tolist() == everything[1 : covered + 1].tolist()
    assert len(stream) - covered <= context_length


@pytest.mark.medium
def test_the_cache_notices_what_changed(tmp_path: Path, source: Source, tokenizer: DocumentTokenizer) -> None:
    def directory(held_out: float = 0.1, **quality: Any) -> Path:
        options: dict[str, Any] = {"quality": Quality(**quality), "cache_dir": tmp_path / "cache"}
        return open_or_prepare("src", source, tokenizer, held_out=held_out, processes=1, **options)[0].directory

    benchmark = tmp_path / "benchmark.jsonl"
    benchmark.write_text(json.dumps({"question": "one two three four five six seven eight nine"}))
    first = directory()
    assert directory() == first
    others = [
        directory(0.2),
        directory(deduplicate="exact"),
        directory(deduplicate="near"),
        directory(filters=Filters(min_words=5)),
        directory(filters=Filters(min_words=6)),
        directory(decontaminate=(str(benchmark),)),
    ]
    benchmark.write_text(json.dumps({"question": "ten two three four five six seven eight nine"}))
    others.append(directory(decontaminate=(str(benchmark),)))
    Path(source.path).write_text(json.dumps({"text": "another text " * 20}) + "\n")
    others.append(directory())
    assert len({first, *others}) == 1 + len(others)


def test_a_failure_leaves_nothing_behind(tmp_path: Path, make: Make, source: Source) -> None:
    with open(source.path, "a") as file:
        file.write('{"text": \n')
    with pytest.raises(ValueError, match="row 401: not JSON"):
        make(source)
    assert list((tmp_path / "cache").glob("shards/*")) == []


def test_a_source_without_text_is_refused(tmp_path: Path, make: Make) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match=r"source 'src' \(.*empty\.jsonl\) holds no text$"):
        make(Source(str(path)))
    path.write_text("{\n" * 3)
    with pytest.raises(ValueError, match=r"holds no text that may be kept: 3 rows were rejected or removed"):
        make(Source(str(path), on_bad_row="skip"))


def test_truncated_and_missing_shards_are_named(make: Make, source: Source, tokenizer: DocumentTokenizer) -> None:
    directory = make(source).directory
    shard = directory / "train-00000.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=rf"train-00000\.arrow has {len(whole) - 10} bytes instead of {len(whole)}"):
        TokenShards(directory, tokenizer).check_sizes()
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-00000\.arrow is missing: delete .* and it will be made again"):
        TokenShards(directory, tokenizer).check_sizes()


def test_a_flipped_byte_is_found_by_verify(make: Make, source: Source, tokenizer: DocumentTokenizer) -> None:
    shards = make(source)
    shards.verify()
    shard = shards.directory / "train-00000.arrow"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"train-00000\.arrow does not hold what was written \(sha256 .* delete"):
        TokenShards(shards.directory, tokenizer).verify()


def test_an_id_outside_the_vocabulary_is_refused_when_it_is_read(
    make: Make, source: Source, tokenizer: DocumentTokenizer
) -> None:
    """4,096 pieces in 16 bits: the highest bit of any token leaves the vocabulary, and an embedding would crash."""
    shards = make(source)
    shard = shards.directory / "train-00000.arrow"
    tokens = shards.tokens("train")
    place = shard.read_bytes().find(tokens.read(0, len(tokens)).tobytes())
    assert place > 0
    del tokens
    data = bytearray(shard.read_bytes())
    data[place + 2 * 100 + 1] |= 0x80
    shard.write_bytes(data)
    stream = TokenShards(shards.directory, tokenizer).tokens("train")
    assert len(stream.row(0, 64)) == 65
    message = r"train-00000\.arrow is damaged: token 100 of it is \d+, the vocabulary has 4096: delete"
    with pytest.raises(ValueError, match=message):
        stream.row(1, 64)
    with pytest.raises(ValueError, match=message):
        stream.token_counts()


def test_a_flipped_byte_in_the_layout_changes_no_token(
    make: Make, source: Source, tokenizer: DocumentTokenizer
) -> None:
    """The places of the tokens are in shards.json, so the layout of a file is not read. --verify finds the damage."""
    shards = make(source)
    shard = shards.directory / "train-00000.arrow"
    whole = shard.read_bytes()
    stream = shards.tokens("train")
    expected = stream.read(0, len(stream)).copy()
    begin = whole.find(expected.tobytes())
    layout = [*range(0, begin, 7), *range(begin + 2 * len(expected), len(whole))]
    assert len(layout) > 100
    for place in layout:
        data = bytearray(whole)
        data[place] ^= 0xFF
        shard.write_bytes(data)
        stream = TokenShards(shards.directory, tokenizer).tokens("train")
        assert np.array_equal(stream.read(0, len(stream)), expected), place
    with pytest.raises(ValueError, match=r"train-00000\.arrow does not hold what was written"):
        shards.verify()


def test_shards_of_another_tokenizer_or_format_are_refused(
    make: Make, source: Source, tokenizer: DocumentTokenizer
) -> None:
    directory = make(source).directory
    meta = json.loads((directory / "shards.json").read_text())
    (directory / "shards.json").write_text(json.dumps(meta | {"tokenizer": meta["tokenizer"] | {"fingerprint": "0"}}))
    with pytest.raises(
        ValueError, match=r"was made with the tokenizer 'danube-small' \(0\), the run uses 'danube-small'"
    ):
        TokenShards(directory, tokenizer)
    (directory / "shards.json").write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(ValueError, match="has the shard format 99, this version reads 3: make it again"):
        TokenShards(directory, tokenizer)
    (directory / "shards.json").write_text(json.dumps(meta | {"splits": {}}))
    with pytest.raises(ValueError, match=r"shards\.json is damaged \('train'\): delete"):
        TokenShards(directory, tokenizer)
    (directory / "shards.json").write_text("{")
    with pytest.raises(ValueError, match=r"is not a shard directory: .*shards\.json is missing or damaged"):
        TokenShards(directory, tokenizer)


def test_token_counts_are_those_of_the_stream(make: Make, source: Source, tokenizer: DocumentTokenizer) -> None:
    shards = make(source, unit_bytes=2000)
    stream, counts = shards.tokens("train"), shards.token_counts("train")
    assert counts.tolist() == stream.token_counts().tolist()
    assert counts.sum() == len(stream) and counts.shape == (tokenizer.vocab_size,)
    assert counts[tokenizer.eos_id] == sum(not is_held_out(text, 0.1) for text in TEXTS)
