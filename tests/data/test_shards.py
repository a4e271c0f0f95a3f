import json
from pathlib import Path

import numpy as np
import pytest

from lightning_danube.data.corpora import Source
from lightning_danube.data.shards import TokenShards, is_held_out, open_or_write_shards, write_shards
from lightning_danube.data.tokenizer import DocumentTokenizer

TEXTS = [f"Document number {n} is about {n * n} things; it has {'many ' * (n % 7)}words." for n in range(400)]


@pytest.fixture(scope="module")
def tokenizer() -> DocumentTokenizer:
    return DocumentTokenizer()


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return Source(str(path))


def make(directory: Path, source: Source, tokenizer: DocumentTokenizer, **options: int) -> TokenShards:
    arguments = {"processes": 1, **options}
    write_shards(directory, "src", source, tokenizer, held_out=0.1, cache_dir=directory.parent, **arguments)
    return TokenShards(directory, tokenizer)


def test_shards_hold_every_document_once_in_order(tmp_path: Path, source: Source, tokenizer: DocumentTokenizer) -> None:
    shards = make(tmp_path / "shards", source, tokenizer)
    for split, held_out in (("train", False), ("validation", True)):
        expected = tokenizer.encode_documents([text for text in TEXTS if is_held_out(text, 0.1) is held_out])
        stream = shards.tokens(split)
        assert stream.read(0, len(stream)).tolist() == np.concatenate(expected).tolist()
        assert shards.counts(split).documents == len(expected)
        assert shards.counts(split).tokens == len(stream)
    # 400 documents at 10 %: the binomial's standard deviation is 6.
    assert 20 <= shards.counts("validation").documents <= 60


def test_they_are_ordinary_files_of_datasets_in_16_bit(
    tmp_path: Path, source: Source, tokenizer: DocumentTokenizer
) -> None:
    import datasets

    make(tmp_path / "shards", source, tokenizer)
    rows = datasets.Dataset.from_file(str(tmp_path / "shards" / "train-00000.arrow"))
    assert rows.features["input_ids"].feature.dtype == "uint16"
    first = next(text for text in TEXTS if not is_held_out(text, 0.1))
    assert rows[0]["input_ids"] == tokenizer.encode_documents([first])[0].tolist()


@pytest.mark.parametrize("context_length", [7, 64, 1000])
def test_rows_cover_the_stream_across_files(
    tmp_path: Path, source: Source, tokenizer: DocumentTokenizer, context_length: int
) -> None:
    stream = make(tmp_path / "shards", source, tokenizer, shard_tokens=500).tokens("train")
    assert len(list((tmp_path / "shards").glob("train-*.arrow"))) > 3
    everything = stream.read(0, len(stream))
    rows = [stream.row(n, context_length) for n in range(stream.rows(context_length))]
    assert all(len(row) == context_length + 1 for row in rows)
    covered = len(rows) * context_length
    assert np.concatenate([row[:-1] for row in rows]).tolist() == everything[:covered].tolist()
    assert np.concatenate([row[1:] for row in rows]).tolist() == everything[1 : covered + 1].tolist()
    assert len(stream) - covered <= context_length


def test_bytes_do_not_depend_on_the_number_of_processes(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} {TEXTS[n % 400]}"}) + "\n" for n in range(6000)))
    make(tmp_path / "one", Source(str(path)), tokenizer, processes=1, shard_tokens=50_000)
    make(tmp_path / "two", Source(str(path)), tokenizer, processes=2, shard_tokens=50_000)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert len(files) > 3
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_max_tokens_stops_reading(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} {TEXTS[n % 400]}"}) + "\n" for n in range(4000)))
    shards = make(tmp_path / "shards", Source(str(path), max_tokens="10K"), tokenizer)
    total = shards.counts("train").tokens + shards.counts("validation").tokens
    assert 10_000 <= total < 25_000  # one batch of documents more at most


def test_the_cache_notices_what_changed(tmp_path: Path, source: Source, tokenizer: DocumentTokenizer) -> None:
    def directory(held_out: float = 0.1) -> Path:
        shards, _ = open_or_write_shards(
            "src", source, tokenizer, held_out=held_out, cache_dir=tmp_path / "cache", processes=1
        )
        return shards.directory

    first = directory()
    assert directory() == first
    assert directory(0.2) != first
    Path(source.path).write_text(json.dumps({"text": "another text " * 20}) + "\n")
    assert directory() != first


def test_a_failure_leaves_nothing_behind(tmp_path: Path, source: Source, tokenizer: DocumentTokenizer) -> None:
    with open(source.path, "a") as file:
        file.write('{"text": \n')
    with pytest.raises(ValueError, match="row 401: not JSON"):
        make(tmp_path / "cache" / "shards", source, tokenizer)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_source_without_text_is_refused(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("")
    with pytest.raises(ValueError, match=r"source 'src' \(.*empty\.jsonl\) holds no text"):
        make(tmp_path / "shards", Source(str(path)), tokenizer)


def test_damaged_shards_are_named(tmp_path: Path, source: Source, tokenizer: DocumentTokenizer) -> None:
    directory = tmp_path / "shards"
    make(directory, source, tokenizer)
    shard = directory / "train-00000.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    with pytest.raises(ValueError, match=rf"train-00000\.arrow has {len(whole) - 10} bytes instead of {len(whole)}"):
        TokenShards(directory, tokenizer)
    shard.unlink()
    with pytest.raises(ValueError, match=r"train-00000\.arrow is missing: delete .* and it will be made again"):
        TokenShards(directory, tokenizer)


def test_shards_of_another_tokenizer_or_format_are_refused(
    tmp_path: Path, source: Source, tokenizer: DocumentTokenizer
) -> None:
    directory = tmp_path / "shards"
    make(directory, source, tokenizer)
    meta = json.loads((directory / "shards.json").read_text())
    (directory / "shards.json").write_text(json.dumps(meta | {"tokenizer": meta["tokenizer"] | {"fingerprint": "0"}}))
    with pytest.raises(ValueError, match=r"was made with the tokenizer 'mistral' \(0\), the run uses 'mistral'"):
        TokenShards(directory, tokenizer)
    (directory / "shards.json").write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(ValueError, match="has the shard format 99, this version reads 1"):
        TokenShards(directory, tokenizer)
    (directory / "shards.json").write_text("{")
    with pytest.raises(ValueError, match=r"is no shard directory: .*shards\.json is missing or damaged"):
        TokenShards(directory, tokenizer)


def test_token_counts_are_those_of_the_stream(tmp_path: Path, source: Source, tokenizer: DocumentTokenizer) -> None:
    stream = make(tmp_path / "shards", source, tokenizer, shard_tokens=500).tokens("train")
    counts = stream.token_counts(tokenizer.vocab_size)
    assert counts.sum() == len(stream)
    assert counts[tokenizer.eos_id] == sum(not is_held_out(text, 0.1) for text in TEXTS)
