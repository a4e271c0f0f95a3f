"""Tokens of several segments as one sequence: its rows, and ids that the vocabulary does not have."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lightning_danube.tokens.shards import SplitWriter, TokenSequence, TokenShards, _edges, _map_tokens
from lightning_danube.tokens.tokenizer import DocumentTokenizer

VOCABULARY = 100


def sequence(*segments: list[int], files: list[str] | None = None) -> TokenSequence:
    names = files or [f"{number}.arrow" for number in range(len(segments))]
    arrays = [np.array(segment, dtype=np.uint16) for segment in segments]
    return TokenSequence(arrays, np.dtype(np.uint16), VOCABULARY, [Path("shards") / name for name in names])


def test_any_window_is_that_of_the_joined_segments() -> None:
    tokens = list(range(40))
    whole = sequence(tokens[:7], tokens[7:8], tokens[8:30], tokens[30:])
    for start in range(41):
        for stop in range(start, 41):
            assert whole.read(start, stop).tolist() == tokens[start:stop]
            assert whole.read(start, stop).dtype == np.uint16


@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (1, 0), (8, 0), (9, 1), (16, 1), (17, 2), (18, 2), (25, 3)])
def test_a_row_has_a_token_more_than_it_predicts(tokens: int, rows: int) -> None:
    stream = sequence(list(range(tokens)))
    assert stream.rows(8) == rows
    assert all(stream.row(number, 8).tolist() == list(range(8 * number, 8 * number + 9)) for number in range(rows))


def test_the_largest_id_is_read_and_the_vocabularys_size_is_refused() -> None:
    fine = sequence([VOCABULARY - 1] * 9)
    assert fine.row(0, 8).max() == VOCABULARY - 1
    assert fine.token_counts(VOCABULARY)[-1] == 9
    damaged = sequence([1, 2, 3], [4, 5, VOCABULARY, 7, 8, 9])
    message = r"^shards/1\.arrow is damaged: token 2 of it is 100, the vocabulary has 100: delete shards and"
    with pytest.raises(ValueError, match=message):
        damaged.row(0, 8)
    with pytest.raises(ValueError, match=message):
        damaged.token_counts(VOCABULARY)


def test_a_damaged_token_is_counted_from_the_start_of_its_file() -> None:
    """A file of several batches is several segments."""
    damaged = sequence([1, 2], [3, 4, 5], [6, 500, 8, 9], files=["a.arrow", "b.arrow", "b.arrow"])
    for call in (lambda: damaged.row(0, 8), lambda: damaged.token_counts(VOCABULARY)):
        with pytest.raises(ValueError, match=r"b\.arrow is damaged: token 4 of it is 500"):
            call()


def test_counts_are_those_of_each_id() -> None:
    stream = sequence([5, 5, 7], [5, 0])
    counts = stream.token_counts(VOCABULARY)
    assert counts.shape == (VOCABULARY,) and counts.dtype == np.int64
    assert {number: int(count) for number, count in enumerate(counts) if count} == {0: 1, 5: 3, 7: 1}


def test_edges_change_with_the_first_and_the_last_token_of_each_chunk() -> None:
    chunks = [np.arange(200, dtype=np.uint16), np.arange(300, dtype=np.uint16)]
    before = _edges(chunks)
    for number, place in ((0, 0), (0, -1), (1, 0), (1, -1), (1, 63), (1, -64)):
        changed = [chunk.copy() for chunk in chunks]
        changed[number][place] += 1
        assert _edges(changed) != before, (number, place)
    assert _edges([np.roll(chunk, 1) for chunk in chunks]) != before


def test_a_new_file_begins_behind_the_document_that_fills_one(tmp_path: Path) -> None:
    writer = SplitWriter(tmp_path, "train", np.dtype(np.uint16), shard_tokens=10)
    documents = [np.full(size, size, dtype=np.uint16) for size in (4, 5, 1, 3, 10, 2)]
    for document in documents:
        writer.add(document)
    written = writer.close()
    assert (written["documents"], written["tokens"]) == (6, 25)
    assert [(file["documents"], file["tokens"]) for file in written["files"]] == [(3, 10), (2, 13), (1, 2)]
    for file in written["files"]:
        path = tmp_path / file["name"]
        assert path.stat().st_size == file["bytes"] and _edges(_map_tokens(path)) == file["edges"]
    tokens = [token for file in written["files"] for chunk in _map_tokens(tmp_path / file["name"]) for token in chunk]
    assert tokens == np.concatenate(documents).tolist()


def test_every_file_of_every_split_is_verified(tmp_path: Path) -> None:
    tokenizer = DocumentTokenizer("danube-small")
    files: dict[str, Any] = {}
    for split in ("train", "validation"):
        writer = SplitWriter(tmp_path, split, np.dtype(np.uint16), shard_tokens=3)
        for _ in range(2):
            writer.add(np.arange(200, dtype=np.uint16))
        files[split] = writer.close()
    shards = TokenShards.__new__(TokenShards)
    shards.directory, shards.meta, shards._vocab_size = tmp_path, {"splits": files}, tokenizer.vocab_size
    shards.verify()
    for split in files:
        for file in files[split]["files"]:
            path = tmp_path / file["name"]
            whole = path.read_bytes()
            path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            with pytest.raises(ValueError, match=f"{file['name']} does not hold what was written"):
                shards.verify()
            path.write_bytes(whole)


@pytest.mark.parametrize(("pieces", "expected"), [(4096, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_have_16_bits_while_the_vocabulary_allows(pieces: int, expected: Any) -> None:
    tokenizer: Any = SimpleNamespace(vocab_size=pieces)
    dtype = DocumentTokenizer.dtype.fget(tokenizer)  # type: ignore[attr-defined]
    assert dtype == expected and np.iinfo(dtype).max >= pieces - 1
