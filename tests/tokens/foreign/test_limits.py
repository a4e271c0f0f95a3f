"""What just fits and what just does not: ids, lengths, documents, and the facts that a listing belongs to."""

import os
import struct
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from lightning_danube.text.corpora import Source
from lightning_danube.tokens.foreign import listing
from lightning_danube.tokens.foreign.listing import ForeignTokens, listing_directory
from lightning_danube.tokens.foreign.mosaic import _Column, _ids_of_samples
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from tests.tokens.foreign.written import FILES, ids_of_documents

Open = Callable[..., ForeignTokens]
DOCUMENTS = ids_of_documents()
IDS = list(chain.from_iterable(DOCUMENTS))
ENDS = list(accumulate(map(len, DOCUMENTS)))


def olmo(path: Path, ids: Sequence[int]) -> Path:
    np.array(ids, dtype="<u2").tofile(path)
    return path


def datatrove(path: Path, documents: Sequence[Sequence[int]], tokenizer: str) -> Path:
    olmo(path, list(chain.from_iterable(documents)))
    ends = list(accumulate(map(len, documents)))
    np.array(ends, dtype="<u8").tofile(f"{path}.index")
    Path(f"{path}.metadata").write_text(f"{tokenizer}|2\n{ends[-1]}\n{ends[-1]}")
    return path


def all_ids(files: ForeignTokens) -> list[int]:
    return [i for split in ("train", "validation") for i in files.tokens(split).read(0, len(files.tokens(split)))]


# --- ids and their types ----------------------------------------------------------------------------------------------


def test_the_size_of_the_vocabulary_is_no_id(
    files: Path, tmp_path: Path, opened: Open, tokenizer: DocumentTokenizer
) -> None:
    size = tokenizer.vocab_size
    path = files / "megatron" / "narrow.bin"
    olmo(path, [*IDS[:7], size - 1, *IDS[8:]])
    assert all_ids(opened(path))[7] == size - 1
    olmo(path, [*IDS[:7], size, *IDS[8:]])
    with pytest.raises(ValueError, match=f"token 7 is {size}, and the tokenizer"):
        opened(path)
    with pytest.raises(ValueError, match=rf"holds no ids of the tokenizer .*\(as uint16 there is an id {size:,},"):
        opened(olmo(tmp_path / "beyond.npy", [*IDS[:7], size, *IDS[8:]]))


def test_a_window_whose_odd_ids_are_all_0_does_not_make_ids_wider(tmp_path: Path, opened: Open) -> None:
    ids = (IDS * 13)[: 16 * 4096]
    ids[3 * 4096 : 4 * 4096] = [2, 0] * 2048
    files = opened(olmo(tmp_path / "padded.npy", ids))
    assert all_ids(files) == ids


def test_numpys_ids_with_the_high_byte_first_are_refused(tmp_path: Path, opened: Open) -> None:
    np.save(tmp_path / "turned.npy", np.array(IDS, dtype=">i4"))
    with pytest.raises(ValueError, match=r"holds >i4 of shape \(5181,\): one row of whole numbers, low byte first"):
        opened(tmp_path / "turned.npy")


@pytest.mark.parametrize(
    ("ids", "header"), [(1, 2), (255, 2), (256, 3), (257, 3), (65_535, 3), (65_536, 5), (65_537, 5)]
)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_mosaics_arrays_have_a_length_of_1_2_or_4_bytes(ids: int, header: int, itemsize: int) -> None:
    sizes = np.array([12 + header + ids * itemsize])
    headers, counts = _ids_of_samples(sizes, _Column(None, 12, 0, True), itemsize, "x.mds")
    assert (headers.tolist(), counts.tolist()) == ([header], [ids])


# --- documents --------------------------------------------------------------------------------------------------------


def test_a_single_document_is_held_out_whole(tmp_path: Path, opened: Open) -> None:
    files = opened(olmo(tmp_path / "one.npy", DOCUMENTS[0]))
    assert files.counts("train").tokens == 0 and files.counts("validation").tokens == len(DOCUMENTS[0])


def test_the_last_document_of_an_index_is_among_those_that_are_checked(
    files: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_CHECKED_ENDS", 4)
    path = olmo(files / "megatron" / "narrow.bin", [*IDS[:-1], 77])
    with pytest.raises(ValueError, match="document 60 ends with token 77"):
        opened(path)


@pytest.mark.parametrize(("at_once", "end"), [(4096, ENDS[9]), (10, ENDS[9]), (10, ENDS[8])])
def test_verify_finds_a_document_that_ends_where_it_begins_or_before(
    at_once: int, end: int, files: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listing, "_CHECKED_ENDS", 4)
    monkeypatch.setattr(listing, "_ENDS_AT_ONCE", at_once)
    index = files / "datatrove-wide" / "wide.ds.index"
    content = bytearray(index.read_bytes())
    content[80:88] = struct.pack("<Q", end)
    index.write_bytes(content)
    with pytest.raises(ValueError, match="the index is damaged, document 11 ends before it begins"):
        opened(files / "datatrove-wide" / "wide.ds").verify()


# --- the tokenizer ----------------------------------------------------------------------------------------------------


def test_a_few_texts_that_decoding_changes_make_no_other_tokenizer(tmp_path: Path, opened: Open) -> None:
    """Every tenth document has its ids in another order, for which the text of these ids has others."""
    documents = [
        [*reversed(document[:-1]), document[-1]] if number % 10 == 9 else document
        for number, document in enumerate(DOCUMENTS * 20)
    ]
    files = opened(datatrove(tmp_path / "many.ds", documents, "another"))
    assert files.facts.agreement is not None and 0.8 <= files.facts.agreement < 1
    assert files.facts.tokenizers == ("another",) and files.doubt() is None


def test_the_cut_end_of_a_text_is_not_compared(tmp_path: Path, opened: Open, tokenizer: DocumentTokenizer) -> None:
    """The first 64 ids end within a character, which stands for no text."""
    (whole,) = tokenizer.encode_documents(["a" + 40 * "𓀀"])
    whole = whole[int(tokenizer.bos_id is not None) :]
    (again,) = tokenizer.encode_documents([tokenizer.text(whole[:64])])
    assert again[int(tokenizer.bos_id is not None) : -1].tolist() != whole[:64].tolist()
    files = opened(olmo(tmp_path / "cut.npy", [*whole.tolist(), *DOCUMENTS[0]]))
    assert files.facts.agreement == 1


def test_datatroves_unknown_tokenizer_is_none(tmp_path: Path, opened: Open) -> None:
    assert opened(datatrove(tmp_path / "x.ds", DOCUMENTS, "Unknown Tokenizer|2")).facts.tokenizers == ()
    assert opened(datatrove(tmp_path / "y.ds", DOCUMENTS, "a|b")).facts.tokenizers == ("a|b",)


# --- files that change ------------------------------------------------------------------------------------------------


def test_a_listing_belongs_to_a_tokenizer_and_to_a_moment(
    files: Path, tmp_path: Path, tokenizer: DocumentTokenizer
) -> None:
    path = files / "olmo" / "narrow.npy"

    def directory(tokenizer: DocumentTokenizer) -> Path:
        return listing_directory("books", Source(str(path)), tokenizer, 0.1, tmp_path)

    os.utime(path, ns=(0, 10**18))
    first = directory(tokenizer)
    assert directory(DocumentTokenizer("mistral")) != first == directory(tokenizer)
    os.utime(path, ns=(0, 10**18 + 1))
    assert directory(tokenizer) != first


@pytest.fixture
def store() -> Iterator[Any]:
    store = fsspec.filesystem("memory")
    store.store.clear()
    yield store
    store.store.clear()


def test_a_range_of_a_file_that_was_replaced_is_read_anew(store: Any, opened: Open) -> None:
    content = (FILES / "olmo" / "narrow.npy").read_bytes()
    for turned in (0, 2 * ENDS[0]):
        store.pipe_file("/bucket/x.npy", content[turned:] + content[:turned])
        tokens = opened("memory://bucket/x.npy").tokens("train")
        assert tokens.read(50, 83).tolist() == IDS[50 + turned // 2 : 83 + turned // 2]
