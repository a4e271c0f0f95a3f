"""Tokens of several segments as one sequence: its rows, and ids that the vocabulary does not have."""

import errno
import hashlib
import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lightning_danube.tokens import shards, token_sequence
from lightning_danube.tokens.finished_shards import FORMAT
from lightning_danube.tokens.shards import SPLITS, SplitWriter, TokenShards, joined_splits, write_token_counts
from lightning_danube.tokens.token_sequence import OpenFiles, TokenSegment, TokenSequence
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from tests.token_files import noting, sequence_of

VOCABULARY = 100
Make = Callable[..., TokenSequence]


@pytest.fixture
def sequence(tmp_path: Path) -> Make:
    def make(*segments: list[int], **options: Any) -> TokenSequence:
        arrays = [np.array(segment, dtype=np.uint16) for segment in segments]
        return sequence_of(tmp_path / "shards", arrays, VOCABULARY, **options)

    return make


def test_any_window_is_that_of_the_joined_segments(sequence: Make) -> None:
    tokens = list(range(40))
    whole = sequence(tokens[:7], tokens[7:8], tokens[8:30], tokens[30:])
    for start in range(41):
        for stop in range(start, 41):
            assert whole.read(start, stop).tolist() == tokens[start:stop]
            assert whole.read(start, stop).dtype == np.uint16


@pytest.mark.parametrize(("tokens", "rows"), [(0, 0), (1, 0), (8, 0), (9, 1), (16, 1), (17, 2), (18, 2), (25, 3)])
def test_a_row_has_a_token_more_than_it_predicts(sequence: Make, tokens: int, rows: int) -> None:
    stream = sequence(list(range(tokens)))
    assert stream.rows(8) == rows
    assert all(stream.row(number, 8).tolist() == list(range(8 * number, 8 * number + 9)) for number in range(rows))


def test_the_largest_id_is_read_and_the_vocabularys_size_is_refused(sequence: Make) -> None:
    fine = sequence([VOCABULARY - 1] * 9)
    assert fine.row(0, 8).max() == VOCABULARY - 1
    assert fine.token_counts()[-1] == 9
    damaged = sequence([1, 2, 3], [4, 5, VOCABULARY, 7, 8, 9])
    message = r"shards/1\.arrow is damaged: token 2 of it is 100, the vocabulary has 100: delete \S+shards and it"
    with pytest.raises(ValueError, match=message):
        damaged.row(0, 8)
    with pytest.raises(ValueError, match=message):
        damaged.token_counts()


def test_a_damaged_token_is_counted_from_the_start_of_its_file(sequence: Make) -> None:
    """A file of several batches is several segments."""
    damaged = sequence([1, 2], [3, 4, 5], [6, 500, 8, 9], names=["a.arrow", "b.arrow", "b.arrow"])
    for call in (lambda: damaged.row(0, 8), lambda: damaged.token_counts()):
        with pytest.raises(ValueError, match=r"b\.arrow is damaged: token 4 of it is 500"):
            call()


def test_counts_are_those_of_each_id(sequence: Make) -> None:
    stream = sequence([5, 5, 7], [5, 0])
    counts = stream.token_counts()
    assert counts.shape == (VOCABULARY,) and counts.dtype == np.int64
    assert {number: int(count) for number, count in enumerate(counts) if count} == {0: 1, 5: 3, 7: 1}


def test_a_file_is_opened_when_it_is_read_and_the_one_read_longest_ago_is_closed(
    sequence: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    real = token_sequence._opened
    monkeypatch.setattr(token_sequence, "_opened", noting(real, lambda path: opened.append(path.stem)))
    stream = sequence([0] * 10, [1] * 10, [2] * 10, [3] * 10, files=OpenFiles(2))
    assert len(stream) == 40 and not opened
    for place, expected in ((5, "0"), (25, "02"), (6, "02"), (35, "023"), (7, "023"), (26, "0232")):
        assert stream.read(place, place + 1) == [place // 10]
        assert "".join(opened) == expected
    copy = pickle.loads(pickle.dumps(stream))
    assert len(opened) == 4 and copy.read(39, 40) == [3] and len(opened) == 5


def test_what_is_wrong_with_a_file_is_told_when_it_is_read(sequence: Make, tmp_path: Path) -> None:
    stream = sequence([0] * 10, [1] * 10)
    (tmp_path / "shards" / "1.arrow").write_bytes(b"123456")
    assert stream.read(0, 13).tolist() == [0] * 10 + np.frombuffer(b"123456", np.uint16).tolist()
    with pytest.raises(ValueError, match=r"1\.arrow ends at byte 6, before its tokens: delete \S+shards and it"):
        stream.read(0, 14)
    (tmp_path / "shards" / "0.arrow").unlink()
    assert stream.read(0, 10).tolist() == [0] * 10  # it is open
    with pytest.raises(ValueError, match=r"0\.arrow is missing: delete \S+shards and it will be made again"):
        pickle.loads(pickle.dumps(stream)).read(0, 1)


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE, errno.ENFILE])
def test_a_machine_without_room_for_a_file_is_not_called_a_damaged_file(
    sequence: Make, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(number, "no room")

    stream = sequence([0] * 10)
    monkeypatch.setattr(token_sequence, "FileIO", refuse)
    with pytest.raises(OSError, match=r"the file is not the cause: raise ulimit -n, or begin fewer") as error:
        stream.read(0, 1)
    assert error.value.errno == number and str(error.value.filename).endswith("0.arrow")
    assert "damaged" not in str(error.value) and "delete" not in str(error.value)


def test_a_disk_that_fails_is_told_with_the_file(sequence: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")  # names no file

    stream = sequence([0] * 10)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match=r"^\[Errno 5\] Input/output error: '\S+0\.arrow'$"):
        stream.read(0, 1)


def test_a_read_that_gives_less_goes_on_behind_it(sequence: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = sequence(list(range(40)))
    asked: list[tuple[int, int]] = []
    pread = os.pread

    def part(descriptor: int, size: int, begin: int) -> bytes:
        asked.append((size, begin))
        return pread(descriptor, min(size, 6), begin)

    monkeypatch.setattr(os, "pread", part)
    assert stream.read(3, 11).tolist() == list(range(3, 11))
    assert asked == [(16, 6), (10, 12), (4, 18)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_are_closed(sequence: Make, tmp_path: Path) -> None:
    def descriptors() -> int:
        return sum(str(tmp_path) in str(path.resolve()) for path in Path("/proc/self/fd").iterdir())

    stream = sequence([0] * 10, [1] * 10, [2] * 10, files=OpenFiles(2))
    for place in (0, 10, 20):
        stream.read(place, place + 1)
    assert descriptors() == 2
    del stream
    assert descriptors() == 0


@pytest.mark.parametrize("at_once", [1, 3, 1 << 24])
def test_counts_do_not_depend_on_how_many_tokens_are_read_at_once(
    sequence: Make, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(token_sequence, "COUNTED_AT_ONCE", at_once)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 50).tolist()
    counts = sequence(tokens[:7], tokens[7:20], tokens[20:]).token_counts()
    assert counts.tolist() == [tokens.count(number) for number in range(VOCABULARY)]


def test_the_places_of_all_batches_of_a_file_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BATCH_TOKENS", 10)
    writer = SplitWriter(tmp_path, "train-00003", np.dtype(np.uint16))
    documents = [np.full(size, size, dtype=np.uint16) for size in (4, 5, 1, 3, 10, 2)]
    for document in documents:
        writer.add(document)
    written = writer.close()
    assert (written["documents"], written["tokens"]) == (6, 25)
    (file,) = written["files"]
    path = tmp_path / file["name"]
    assert path.name == "train-00003.arrow" and path.stat().st_size == file["bytes"]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == file["sha256"]
    assert [tokens for _, tokens in file["segments"]] == [10, 13, 2]
    places = [TokenSegment(path, *segment) for segment in file["segments"]]
    stream = TokenSequence(places, np.dtype(np.uint16), VOCABULARY, remedy="")
    assert stream.read(0, len(stream)).tolist() == np.concatenate(documents).tolist()
    counts = written["token_counts"]
    assert np.load(tmp_path / counts["name"]).tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0, 0, 10]
    assert hashlib.sha256((tmp_path / counts["name"]).read_bytes()).hexdigest() == counts["sha256"]


def test_a_split_is_joined_from_what_several_writers_wrote(tmp_path: Path) -> None:
    parts = []
    for number, documents in enumerate(([3, 5], [], [7])):
        folder = tmp_path / str(number)
        folder.mkdir()
        writer = SplitWriter(folder, f"train-{number:05d}", np.dtype(np.uint16))
        for size in documents:
            writer.add(np.full(size, size, dtype=np.uint16))
        parts.append((folder, writer.close()))
    joined = joined_splits(tmp_path, "train", parts)
    assert [file["name"] for file in joined["files"]] == ["train-00000.arrow", "train-00002.arrow"]
    assert (joined["documents"], joined["tokens"]) == (3, 15)
    assert np.load(tmp_path / joined["token_counts"]["name"]).tolist() == [0, 0, 0, 3, 0, 5, 0, 7]


def shards_of_two_splits(directory: Path) -> TokenShards:
    """Shards with the tokens 0 to 199 twice in each split."""
    tokenizer = DocumentTokenizer("danube-small")
    splits: dict[str, Any] = {}
    for split in SPLITS:
        parts = []
        for number in range(2):
            writer = SplitWriter(directory, f"{split}-{number:05d}", np.dtype(np.uint16))
            writer.add(np.arange(200, dtype=np.uint16))
            parts.append((directory, writer.close()))
        splits[split] = joined_splits(directory, split, parts)
        for _, part in parts:
            (directory / part["token_counts"]["name"]).unlink()
    meta = {"format": FORMAT, "dtype": "uint16", "tokenizer": tokenizer.identity(), "splits": splits}
    (directory / "shards.json").write_text(json.dumps(meta))
    return TokenShards(directory, tokenizer)


def test_every_file_of_every_split_is_verified(tmp_path: Path) -> None:
    made = shards_of_two_splits(tmp_path)
    made.verify()
    files = [path for path in tmp_path.iterdir() if path.name != "shards.json"]
    assert len(files) == 6
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        made.check_sizes()
        with pytest.raises(ValueError, match=f"{path.name} does not hold what was written"):
            made.verify()
        path.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=f"{path.name} has {len(whole) - 1} bytes instead of {len(whole)}: delete"):
            made.check_sizes()
        path.write_bytes(whole)


def test_counts_are_read_and_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = shards_of_two_splits(tmp_path)
    monkeypatch.setattr(token_sequence, "_opened", lambda path: pytest.fail(f"{path} is opened"))
    counts = made.token_counts("train")
    assert counts.tolist() == [2] * 200 + [0] * (DocumentTokenizer("danube-small").vocab_size - 200)
    path = tmp_path / "train-token-counts.npy"
    for wrong in (np.full(200, 3), np.full(100, 2), np.zeros(100_000, dtype=np.int64)):
        write_token_counts(tmp_path, "train", wrong)
        with pytest.raises(ValueError, match=r"counts\.npy is damaged \(its counts are not those of train\): delete"):
            made.token_counts("train")
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"train-token-counts\.npy is damaged \(.*\): delete"):
        made.token_counts("train")
    path.unlink()
    with pytest.raises(ValueError, match=r"train-token-counts\.npy is missing: delete"):
        made.token_counts("train")


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ([-2, 200], "has no place for 200 tokens at -2"),
        ([10**9, 200], "has no place for 200 tokens at 1000000000"),
        ([0, 10**9], "has no place for 1000000000 tokens at 0"),
        ([8, -3], "has no place for -3 tokens at 8"),
        ([8, 199], "the files of train have 399 tokens"),
        ([8], "not enough values"),
        (None, "NoneType"),
        (["a", "b"], "not supported"),
    ],
)
def test_places_outside_a_file_are_refused(tmp_path: Path, segment: Any, message: str) -> None:
    made = shards_of_two_splits(tmp_path)
    made.meta["splits"]["train"]["files"][1]["segments"] = [segment]
    (tmp_path / "shards.json").write_text(json.dumps(made.meta))
    with pytest.raises(ValueError, match=rf"shards\.json is damaged \(.*{message}.*\): delete"):
        TokenShards(tmp_path, DocumentTokenizer("danube-small"))


@pytest.mark.parametrize(("pieces", "expected"), [(4096, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_ids_have_16_bits_while_the_vocabulary_allows(pieces: int, expected: Any) -> None:
    tokenizer: Any = SimpleNamespace(vocab_size=pieces)
    dtype = DocumentTokenizer.dtype.fget(tokenizer)  # type: ignore[attr-defined]
    assert dtype == expected and np.iinfo(dtype).max >= pieces - 1
