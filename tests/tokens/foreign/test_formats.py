"""Files of the real libraries: every id in order, whole documents held out, every damage named in one line."""

import json
import math
import pickle
import struct
from collections.abc import Callable
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import pytest

from lightning_danube.text.corpora import Source
from lightning_danube.tokens.foreign import listing, sequence
from lightning_danube.tokens.foreign.listing import ForeignTokens, list_token_files
from lightning_danube.tokens.foreign.mosaic import Mosaic
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from tests.tokens.foreign.written import FILES, TOKENIZER_FILE, ids_of_documents

Open = Callable[..., ForeignTokens]
DOCUMENTS = ids_of_documents()
IDS = list(chain.from_iterable(DOCUMENTS))
ENDS = list(accumulate(map(len, DOCUMENTS)))
LISTED = ["datatrove-wide/wide.ds", "megatron/narrow.bin", "megatron/wide.idx"]
"""Files whose format lists the ends of documents; each holds all documents."""
UNLISTED = ["olmo/narrow.npy", "olmo/wide.npy", "mosaic/ragged", "mosaic/bytes/index.json"]


def ids(files: ForeignTokens, split: str) -> list[int]:
    tokens = files.tokens(split)
    found: list[int] = tokens.read(0, len(tokens)).tolist()
    return found


@pytest.mark.parametrize("path", LISTED + UNLISTED)
def test_all_ids_are_read_in_order_and_the_last_documents_are_held_out(path: str, opened: Open) -> None:
    files = opened(FILES / path)
    cut = max(end for end in [0, *ENDS] if end <= len(IDS) - math.ceil(0.1 * len(IDS)))
    assert ids(files, "train") == IDS[:cut] and ids(files, "validation") == IDS[cut:]
    counts = [files.counts(split) for split in ("train", "validation")]
    assert [count.tokens for count in counts] == [cut, len(IDS) - cut]
    held_out = sum(end > cut for end in ENDS)
    documents = [60 - held_out, held_out] if path in LISTED else [None, None]
    assert [count.documents for count in counts] == documents
    said = files.verify()
    assert f"all {len(IDS):,} ids" in said and ("ends of all 60 documents" in said) is (path in LISTED)


@pytest.mark.parametrize("path", LISTED + UNLISTED)
def test_any_window_is_that_of_the_whole_also_in_another_process(path: str, opened: Open) -> None:
    tokens = opened(FILES / path).tokens("train")
    tokens.read(0, 1)
    copy = pickle.loads(pickle.dumps(tokens))
    for start, stop in [(0, 0), (0, 1), (63, 65), (254, 257), (1, 2000), (1499, 1502), (len(tokens) - 1, len(tokens))]:
        assert copy.read(start, stop).tolist() == IDS[start:stop]
    assert copy.read(0, 5).dtype == np.uint16
    assert copy.rows(100) == (len(tokens) - 1) // 100 and copy.row(7, 100).tolist() == IDS[700:801]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3])
def test_several_files_give_of_their_last_documents_until_the_share_is_reached(share: float, opened: Open) -> None:
    files = opened(FILES / "datatrove" / "*.ds", share)
    first, second = ENDS[39], len(IDS)
    cut = max(end for end in [0, *ENDS[:40]] if end <= first - math.ceil(share * first))
    wanted = math.ceil(share * second) - (first - cut)
    later = max(end for end in ENDS[39:] if end <= second - wanted) if wanted > 0 else second
    assert ids(files, "train") == IDS[:cut] + IDS[first:later]
    assert ids(files, "validation") == IDS[cut:first] + IDS[later:]
    held_out = files.counts("validation").tokens
    assert 0 <= held_out - share * len(IDS) < max(map(len, DOCUMENTS))
    assert files.facts.tokenizers == (TOKENIZER_FILE,)


def test_documents_that_go_on_in_the_next_shard_stay_in_one_part(opened: Open) -> None:
    files = opened(FILES / "mosaic" / "fixed")
    held_out = ids(files, "validation")
    whole = len(IDS) // 64 * 64  # the writer left the last, short sample out
    assert ids(files, "train") + held_out == IDS[:whole]
    assert whole - len(held_out) in ENDS


def test_a_sample_of_the_ids_is_counted_and_the_share_is_told(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "COUNTED", 256)
    monkeypatch.setattr(sequence, "WINDOWS", 8)
    files = opened(FILES / "olmo" / "narrow.npy")
    train = ids(files, "train")
    last = len(train) - 32
    expected = np.zeros(files.tokens("train").vocab_size, dtype=np.int64)
    for number in range(8):
        start = last * number // 7
        np.add.at(expected, train[start : start + 32], 1)
    assert files.token_counts("train").tolist() == expected.tolist()
    assert files.facts.counted == 256 and "checked: 256 ids" in files.described()


def test_opening_reads_no_file_and_a_read_touches_only_its_bytes(
    opened: Open, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened(files / "datatrove" / "*.ds")
    asked: list[tuple[str, int, int]] = []
    tokens = opened(files / "datatrove" / "*.ds").tokens("train")
    real = tokens._ranges.read

    def read(path: str, start: int, stop: int, stamp: str) -> memoryview:
        asked.append((path, start, stop))
        return real(path, start, stop, stamp)

    monkeypatch.setattr(tokens._ranges, "read", read)
    assert not tokens._ranges._files._files
    tokens.read(100, 110)
    (touched,) = asked
    assert touched[0].endswith("00000_unshuffled.ds") and touched[1:] == (200, 220)


def test_a_changed_file_gets_another_listing(opened: Open, files: Path) -> None:
    path = files / "olmo" / "narrow.npy"
    first = opened(path).directory
    assert opened(path).directory == first and opened(path, 0.2).directory != first
    path.write_bytes(path.read_bytes()[: 2 * ENDS[50]])
    assert opened(path).directory != first and ids(opened(path), "train") == IDS[: len(ids(opened(path), "train"))]


def test_an_array_that_numpy_saved_has_its_type_in_its_header(opened: Open, tmp_path: Path) -> None:
    np.save(tmp_path / "saved.npy", np.array(IDS, dtype=np.int32))
    files = opened(tmp_path / "saved.npy")
    assert ids(files, "train") + ids(files, "validation") == IDS


def test_documents_of_several_megatron_files_that_go_before_have_their_ends(tokenizer: DocumentTokenizer) -> None:
    from lightning_danube.tokens.foreign.listing import format_named
    from lightning_danube.tokens.foreign.ranges import ByteRanges

    for path in LISTED:
        kind, ranges = format_named(path), ByteRanges(str(FILES / path), Path("unused"))
        (group,) = kind.groups(ranges, kind.find(ranges, str(FILES / path)), tokenizer)
        for first, stop in [(0, 60), (0, 1), (59, 60), (7, 30)]:
            assert kind.document_ends(ranges, group, first, stop).tolist() == ENDS[first:stop]


@pytest.mark.parametrize("at_once", [1, 7, 60])
def test_the_cut_is_found_whatever_part_of_an_index_is_read_at_once(
    at_once: int, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_ENDS_AT_ONCE", at_once)
    monkeypatch.setattr(listing, "_SCANNED_AT_ONCE", at_once)
    for share in (0.0001, 0.05, 0.3, 0.9, 0.9999):
        cut = max(end for end in [0, *ENDS] if end <= len(IDS) - math.ceil(share * len(IDS)))
        for path in ("megatron/wide.idx", "olmo/narrow.npy"):
            assert opened(FILES / path, share).counts("train").tokens == cut, (path, share)


# --- bad input --------------------------------------------------------------------------------------------------------


def cut_off(path: Path, by: int) -> None:
    path.write_bytes(path.read_bytes()[:-by])


DAMAGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no file": ("nothing/*.ds", lambda f: None, r"there is no file .*nothing/\*\.ds"),
    "datatrove, empty": (
        "datatrove-wide/wide.ds",
        lambda f: (f / "datatrove-wide/wide.ds").write_bytes(b""),
        "is empty",
    ),
    "datatrove, no index": (
        "datatrove/*.ds",
        lambda f: (f / "datatrove/00001_unshuffled.ds.index").unlink(),
        "00001_unshuffled.ds.index is missing, which lists the ends of documents: copy it beside",
    ),
    "datatrove, part of an entry": (
        "datatrove-wide/wide.ds",
        lambda f: cut_off(f / "datatrove-wide/wide.ds.index", 3),
        "has 477 bytes, not 8 for each document: it was cut off",
    ),
    "datatrove, index cut off": (
        "datatrove-wide/wide.ds",
        lambda f: cut_off(f / "datatrove-wide/wide.ds.index", 8),
        "its index lists 5,.* tokens of 2 or 4 bytes each: the file or its index was cut off",
    ),
    "datatrove, metadata say more": (
        "datatrove/*.ds",
        lambda f: cut_off(f / "datatrove/00000_unshuffled.ds.index", 8),
        r"lists 3,\d+ tokens, and .*metadata 3,467: one of them was cut off",
    ),
    "datatrove, tokens cut off": (
        "datatrove/*.ds",
        lambda f: cut_off(f / "datatrove/00000_unshuffled.ds", 2),
        "has 6,932 bytes, and its index lists 3,467 tokens",
    ),
    "datatrove, metadata": (
        "datatrove/*.ds",
        lambda f: (f / "datatrove/00000_unshuffled.ds.metadata").write_text("?"),
        "metadata is damaged, it should say tokenizer|bytes of an id",
    ),
    "datatrove, loss": (
        "datatrove/*.ds",
        lambda f: (f / "datatrove/00000_unshuffled.ds.loss").write_bytes(b"\1"),
        "loss leaves tokens out of the loss, which is not read here",
    ),
    "Megatron, no index": (
        "megatron/*.bin",
        lambda f: (f / "megatron/wide.idx").unlink(),
        "wide.idx is missing, which lists the ends of documents",
    ),
    "Megatron, no tokens": (
        "megatron/*.idx",
        lambda f: (f / "megatron/wide.bin").unlink(),
        "wide.bin is missing, to which .*wide.idx belongs",
    ),
    "Megatron, empty": ("megatron/wide.bin", lambda f: (f / "megatron/wide.bin").write_bytes(b""), "wide.bin is empty"),
    "Megatron, index cut off": (
        "megatron/wide.bin",
        lambda f: cut_off(f / "megatron/wide.idx", 8),
        "has 1,954 bytes instead of 1,962 for 120 sequences and 60 documents: it was cut off",
    ),
    "Megatron, head cut off": (
        "megatron/wide.bin",
        lambda f: cut_off(f / "megatron/wide.idx", 1950),
        r"wide.idx is not an index of Megatron \(version 1\), or was cut off",
    ),
    "Megatron, tokens cut off": (
        "megatron/wide.bin",
        lambda f: cut_off(f / "megatron/wide.bin", 3),
        "has 20,721 bytes, and its index lists 5,181 tokens of 4 bytes each",
    ),
    "Megatron, floats": (
        "megatron/wide.bin",
        lambda f: overwrite(f / "megatron/wide.idx", 17, b"\7"),
        "says that the ids are float32: only whole numbers are read",
    ),
    "Megatron, modes": (
        "megatron/wide.bin",
        lambda f: (f / "megatron/wide.idx").write_bytes((f / "megatron/wide.idx").read_bytes() + bytes(120)),
        "lists modes of sequences: data of several modes are not read",
    ),
    "Megatron, last document": (
        "megatron/wide.bin",
        lambda f: overwrite(f / "megatron/wide.idx", 1954, struct.pack("<q", 119)),
        "is damaged: its last document does not end with its last sequence",
    ),
    "Megatron, documents": (
        "megatron/wide.bin",
        lambda f: overwrite(f / "megatron/wide.idx", 1954, struct.pack("<q", 121)),
        "is damaged: its documents are not in order",
    ),
    "OLMo, empty": ("olmo/*.npy", lambda f: (f / "olmo/wide.npy").write_bytes(b""), "wide.npy is empty"),
    "OLMo, odd": ("olmo/*.npy", lambda f: cut_off(f / "olmo/narrow.npy", 1), "has 10,361 bytes, no multiple of 2"),
    "OLMo, another type": (
        "olmo/narrow.npy",
        lambda f: np.array(IDS, dtype="<f4").tofile(f / "olmo/narrow.npy"),
        r"narrow.npy holds no ids of the tokenizer 'danube-small' with its [\d,]+ tokens \(as uint16 there is an id",
    ),
    "OLMo, bytes": (
        "olmo/narrow.npy",
        lambda f: np.save(f / "olmo/narrow.npy", np.array(IDS, dtype=np.float32)),
        r"holds float32 of shape \(5181,\): one row of whole numbers, low byte first, is read",
    ),
    "OLMo, header": (
        "olmo/narrow.npy",
        lambda f: (f / "olmo/narrow.npy").write_bytes(b"\x93NUMPY\x01\x00\x04\x00abcd"),
        "has a damaged header of numpy",
    ),
    "OLMo, no end tokens": (
        "olmo/narrow.npy",
        lambda f: np.array([index for index in IDS if index != 2], dtype=np.uint16).tofile(f / "olmo/narrow.npy"),
        r"none of [\d,]+ tokens that were looked at is the end token 2 of the tokenizer 'danube-small'",
    ),
    "MDS, shard cut off": (
        "mosaic/fixed",
        lambda f: cut_off(f / "mosaic/fixed/shard.00001.mds", 4),
        r"shard.00001.mds has [\d,]+ bytes instead of [\d,]+: it was cut off",
    ),
    "MDS, no shard": (
        "mosaic/fixed",
        lambda f: (f / "mosaic/fixed/shard.00001.mds").unlink(),
        "shard.00001.mds is missing, which .*index.json lists",
    ),
    "MDS, compressed": ("mosaic/packed", lambda f: None, r"is compressed \(zstd\), and a row cannot be read"),
    "MDS, no columns": (
        "mosaic/fixed",
        lambda f: relist(f / "mosaic/fixed/index.json", column_names=["text"]),
        "with the columns text: none of them is tokens or input_ids",
    ),
    "MDS, another column": (
        "mosaic/fixed",
        lambda f: relist(f / "mosaic/fixed/index.json", column_encodings=["ndarray:float32:64"]),
        "tokens is 'ndarray:float32:64': bytes, and ndarray with a type of whole numbers are read",
    ),
    "MDS, two that vary": (
        "mosaic/ragged",
        lambda f: relist(f / "mosaic/ragged/index.json", column_sizes=[None, None]),
        "only the column tokens may have a size that varies",
    ),
    "MDS, another format": (
        "mosaic/fixed",
        lambda f: relist(f / "mosaic/fixed/index.json", format="json"),
        "lists shard.00000.mds with the format 'json', version 2: mds, version 2 is read",
    ),
    "MDS, damaged listing": (
        "mosaic/fixed",
        lambda f: (f / "mosaic/fixed/index.json").write_text('{"shards": [{}]}'),
        "is not a listing of MDS shards, or is damaged",
    ),
    "MDS, no listing": (
        "mosaic/fixed",
        lambda f: (f / "mosaic/fixed/index.json").write_text('{"shards": []}'),
        "lists no shards",
    ),
    "MDS, other samples": (
        "mosaic/fixed",
        lambda f: relist(f / "mosaic/fixed/index.json", samples=3),
        "its samples are not those that index.json lists",
    ),
    "MDS, two axes": (
        "mosaic/ragged",
        lambda f: overwrite_first_sample(f / "mosaic/ragged/shard.00000.mds"),
        "a sample is an array of 2 axes, and one axis is read",
    ),
}


def overwrite(path: Path, place: int, content: bytes) -> None:
    whole = bytearray(path.read_bytes())
    whole[place : place + len(content)] = content
    path.write_bytes(whole)


def relist(path: Path, **changes: object) -> None:
    listed = json.loads(path.read_text())
    listed["shards"][0] |= changes
    path.write_text(json.dumps(listed))


def overwrite_first_sample(path: Path) -> None:
    (first,) = struct.unpack_from("<I", path.read_bytes(), 4)
    # Columns are sorted: "number" (8 bytes) stands before "tokens", and before both the size of "tokens".
    overwrite(path, first + 12, bytes([2 << 2]))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_in_one_line(damage: str, files: Path, opened: Open) -> None:
    path, harm, message = DAMAGES[damage]
    harm(files)
    with pytest.raises(ValueError, match=message) as raised:
        opened(files / path)
    said = str(raised.value)
    assert said.startswith("source 'books': ") and "\n" not in said
    assert not (files.parent / "cache" / "token-files").exists()


def test_an_id_above_the_vocabulary_is_named_with_its_place(files: Path, opened: Open) -> None:
    path = files / "megatron" / "narrow.bin"
    whole = np.fromfile(path, dtype=np.uint16)
    whole[1234] = 60_000
    whole.tofile(path)
    with pytest.raises(ValueError, match=r"narrow.bin: token 1,234 is 60000, and the tokenizer 'danube-small' has"):
        opened(path)


def test_a_negative_id_is_refused(files: Path, opened: Open) -> None:
    path = files / "megatron" / "wide.bin"
    whole = np.fromfile(path, dtype=np.int32)
    whole[7] = -1
    whole.tofile(path)
    with pytest.raises(ValueError, match="token 7 is -1"):
        opened(path)


def test_documents_without_an_end_token_are_refused(files: Path, opened: Open) -> None:
    path = files / "megatron" / "narrow.bin"
    whole = np.fromfile(path, dtype=np.uint16)
    whole[ENDS[0] - 1] = 77
    whole.tofile(path)
    with pytest.raises(ValueError, match="document 1 ends with token 77, not with the end token 2 of the tokenizer"):
        opened(path)


def test_a_document_between_those_that_are_checked_is_found_by_verify(
    files: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_CHECKED_ENDS", 4)
    path = files / "megatron" / "narrow.bin"
    whole = np.fromfile(path, dtype=np.uint16)
    whole[ENDS[10] - 1] = 77
    whole.tofile(path)
    with pytest.raises(ValueError, match="document 11 ends with token 77"):
        opened(path).verify()


def test_an_index_out_of_order_is_found_by_verify(files: Path, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_CHECKED_ENDS", 4)
    overwrite(files / "datatrove-wide" / "wide.ds.index", 8 * 10, struct.pack("<Q", ENDS[8]))
    with pytest.raises(ValueError, match="the index is damaged, document 11 ends before it begins"):
        opened(files / "datatrove-wide" / "wide.ds").verify()


def test_an_index_beyond_the_tokens_is_refused(files: Path, opened: Open) -> None:
    overwrite(files / "datatrove-wide" / "wide.ds.index", 8 * 10, struct.pack("<Q", 1 << 40))
    with pytest.raises(ValueError, match=r"the index is damaged, document 11 ends at token 1,099,511,627,776"):
        opened(files / "datatrove-wide" / "wide.ds")


def test_a_file_that_was_removed_after_its_listing_is_named_when_it_is_read(files: Path, opened: Open) -> None:
    tokens = opened(files / "olmo" / "narrow.npy").tokens("train")
    (files / "olmo" / "narrow.npy").unlink()
    with pytest.raises(ValueError, match=r"narrow.npy is missing: put it back"):
        tokens.read(0, 1)


def test_options_of_texts_are_refused(tokenizer: DocumentTokenizer, tmp_path: Path) -> None:
    source = Source(str(FILES / "olmo" / "narrow.npy"), max_tokens="1M")
    with pytest.raises(ValueError, match="source 'books': max_tokens is 1000000, which has no effect on token files"):
        list_token_files("books", source, tokenizer, 0.1, tmp_path)


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_files_that_name_another_tokenizer_are_refused(opened: Open) -> None:
    with pytest.raises(ValueError, match=r"name the tokenizer '.*', and 'mistral' gives the ids of the .* 0%"):
        opened(FILES / "datatrove" / "*.ds", tokenizer=DocumentTokenizer("mistral"))


def test_files_of_an_unnamed_tokenizer_leave_a_doubt(opened: Open) -> None:
    files = opened(FILES / "megatron" / "narrow.bin", tokenizer=DocumentTokenizer("mistral"))
    assert "the tokenizer 'mistral' gives the ids of the files to only 0% of the sampled documents" in str(
        files.doubt()
    )
    assert opened(FILES / "megatron" / "narrow.bin").doubt() is None


def test_a_begin_token_belongs_to_a_document(opened: Open, tokenizer: DocumentTokenizer, tmp_path: Path) -> None:
    assert tokenizer.bos_id is not None
    begun = list(chain.from_iterable([tokenizer.bos_id, *document] for document in DOCUMENTS))
    np.array(begun, dtype=np.uint16).tofile(tmp_path / "begun.npy")
    files = opened(tmp_path / "begun.npy")
    assert files.facts.begin_token and files.facts.agreement == 1
    assert not opened(FILES / "olmo" / "narrow.npy").facts.begin_token


def test_tables_of_samples_are_kept_for_some_files_only(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_danube.tokens.foreign import mosaic

    monkeypatch.setattr(mosaic, "_MOST_TABLES", 2)
    files = opened(FILES / "mosaic" / "ragged")
    assert ids(files, "train") == IDS[: files.counts("train").tokens]
    assert isinstance(files._kind, Mosaic) and len(files._kind._tables) == 2
