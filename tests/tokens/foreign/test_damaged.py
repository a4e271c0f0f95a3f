"""Token files that were damaged at random: each is named in one line, or every id is read that the file holds."""

import os
import random
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest

from lightning_danube.tokens.foreign import content_type
from lightning_danube.tokens.foreign.content_type import dtype_of_content
from lightning_danube.tokens.foreign.listing import ForeignTokens
from lightning_danube.tokens.foreign.ranges import ByteRanges
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from tests.tokens.foreign.written import FILES, ids_of_documents

Open = Callable[..., ForeignTokens]
IDS = list(chain.from_iterable(ids_of_documents()))
WITHOUT_END = len(IDS) // 64 * 64  # the writer left the last, short sample out
SOURCES = {
    "datatrove-wide/wide.ds": IDS,
    "megatron/narrow.bin": IDS,
    "megatron/wide.idx": IDS,
    "olmo/wide.npy": IDS,
    "numpy/saved.npy": IDS,
    "mosaic/ragged": IDS,
    "mosaic/bytes/index.json": IDS,
    "mosaic/fixed": IDS[:WITHOUT_END],
}
CONTENT = (".ds", ".bin", ".npy", ".mds")
WORDS = (b"\xff" * 8, bytes(8), b"\0" * 7 + b"\x80", b"\xff" * 7 + b"\x7f", b"\0\0\0\x80" * 2)
TEXTS = (
    b"",
    b"\0",
    b"[",
    b"null",
    b'{"shards": 5}',
    b'{"shards": [' + b"9" * 5000 + b"]}",
    b'{"shards":' + b"[" * 50_000,
    b"\x93NUMPY",
    b"\x93NUMPY\x09\x09",
    b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 4000,
    b"x|-2\n-4\n",
    b"x|2\n" + b"9" * 5000,
    b"\xff\xfe\0",
)


def damage(folder: Path, dice: random.Random) -> tuple[Path, bool]:
    """Damages one file of a source. Returns the file, and whether only its ids may have changed."""
    path = dice.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content, kind = bytearray(path.read_bytes()), dice.randrange(10)
    place = dice.randrange(len(content))
    if kind < 4:
        content[place if kind else place % 200] ^= 1 << dice.randrange(8)
    elif kind == 4:
        place = dice.randrange(min(400, len(content)))
        content[place : place + 8] = dice.choice(WORDS)[: len(content) - place]
    elif kind == 5:
        del content[place:]
    elif kind == 6:
        content += dice.randbytes(dice.choice([1, 2, 4, 8, 64]))
    elif kind == 7:
        content = bytearray(dice.choice(TEXTS))
    path.unlink()
    if kind < 8:
        path.write_bytes(content)
    elif kind == 8:
        os.mkfifo(path)
    return path, kind < 5 and path.suffix in CONTENT


@pytest.mark.medium
@pytest.mark.parametrize("source", SOURCES)
def test_damage_is_named_or_changes_nothing_but_the_ids_that_it_hits(source: str, opened: Open, tmp_path: Path) -> None:
    """The formats have no hashes, so an id that became another one cannot be noticed. Nothing else may change."""
    folder = tmp_path / "files" / source.partition("/")[0]
    if "mosaic" in source:
        folder = tmp_path / "files" / Path(source).with_suffix("").as_posix().removesuffix("/index")
    refused = 0
    for seed in range(30):
        shutil.rmtree(tmp_path / "files", ignore_errors=True)
        shutil.copytree(FILES, tmp_path / "files")
        (tmp_path / "files" / "numpy").mkdir()
        np.save(tmp_path / "files" / "numpy" / "saved.npy", np.array(IDS, np.uint16))
        dice = random.Random(f"{source}/{seed}")
        path, ids_alone = damage(folder, dice)
        try:
            files = opened(tmp_path / "files" / source)
            tokens = [files.tokens(split) for split in ("train", "validation")]
            read = [int(one) for part in tokens for one in part.read(0, len(part))]
            files.token_counts("train"), files.described(), files.doubt()
        except ValueError as error:
            message = str(error)
            assert "\n" not in message and len(message) < 1000, (seed, message)
            refused += 1
            continue
        if len(read) < len(SOURCES[source]) and source == "olmo/wide.npy":
            assert read == IDS[: len(read)], seed  # a file without a header does not say its size
        elif ids_alone:
            assert len(read) == len(SOURCES[source]), (seed, path)
            wrong = sum(one != other for one, other in zip(read, SOURCES[source], strict=True))
            assert wrong <= 5, (seed, path)  # of 8 bytes, which may begin in the middle of an id of 2
        else:
            assert read == SOURCES[source], (seed, path)
    assert refused >= 5


@pytest.mark.parametrize(
    ("path", "gone", "message"),
    [
        ("datatrove/*.ds", "00000_unshuffled.ds", r"00000_unshuffled\.ds is missing, to which .*\.ds\.index belongs"),
        (
            "mosaic/ragged",
            "index.json",
            r"ragged/index\.json, which lists the shards, is not a file: copy it there again",
        ),
    ],
)
def test_a_file_that_is_a_pipe_is_missing(path: str, gone: str, message: str, opened: Open, files: Path) -> None:
    (place,) = (files / path.partition("/")[0]).rglob(gone) if "*" in path else [files / path / gone]
    place.unlink()
    os.mkfifo(place)
    with pytest.raises(ValueError, match=message):
        opened(files / path)


def test_shards_of_two_types_are_damage(opened: Open, files: Path) -> None:
    """A shard whose ids could also be of another type: four bytes of each id are 0, but in one id they are not."""
    shard = files / "mosaic" / "bytes" / "shard.00001.mds"
    content = bytearray(shard.read_bytes())
    for place in range(215, len(content) - 8, 516):
        ids = np.frombuffer(bytes(content[place : place + 512]), "<i8")
        content[place : place + 512] = np.repeat(ids, 2).astype("<u4").tobytes()
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard\.00001\.mds holds uint32, and \S+shard\.00000\.mds int64: the shards"):
        opened(files / "mosaic" / "bytes")


def test_a_flipped_bit_does_not_make_ids_narrower(tmp_path: Path, tokenizer: DocumentTokenizer) -> None:
    """In 4 bytes an id has an upper half of 0. One upper half that is damaged is not a reason to read 2 bytes."""
    ids = np.array(IDS, "<u4")
    ids[7] |= 1 << 20
    (tmp_path / "x.npy").write_bytes(ids.tobytes())
    ranges = ByteRanges(str(tmp_path / "x.npy"), tmp_path)
    with pytest.raises(ValueError, match=r"as uint16 every second id is 0, as uint32 there is an id 1,0"):
        dtype_of_content(ranges, str(tmp_path / "x.npy"), "", 0, 4 * len(ids), tokenizer)


def test_a_large_vocabulary_has_no_ids_of_two_bytes(
    tmp_path: Path, tokenizer: DocumentTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of these ids are above 65,535, so no upper half is 0, and both halves belong to the vocabulary."""
    monkeypatch.setattr(tokenizer, "vocab_size", 100_352)
    ids = np.array([65_536 + number * 37 % 34_000 for number in range(4000)], "<u4")
    (tmp_path / "x.npy").write_bytes(ids.tobytes())
    ranges = ByteRanges(str(tmp_path / "x.npy"), tmp_path)
    assert content_type.dtype_of_content(ranges, str(tmp_path / "x.npy"), "", 0, 16_000, tokenizer) == "uint32"


@pytest.mark.parametrize("name", ["listing.json", "token-counts.npy"])
def test_a_flipped_bit_in_what_is_known_of_the_files_is_named(name: str, opened: Open) -> None:
    """Without its hash, a digit of the listing would move held-out tokens to training."""
    source = FILES / "datatrove" / "*.ds"
    place = opened(source).directory / name
    right = place.read_bytes()
    for number in range(0, len(right), max(1, len(right) // 60)):
        content = bytearray(right)
        content[number] ^= 1 << number % 8
        place.write_bytes(content)
        try:
            opened(source).token_counts("train")
        except ValueError as error:
            assert f"{name} is damaged" in str(error) and "remove it, and it is made again" in str(error)
        else:
            pytest.fail(f"byte {number} of {name} is wrong, and is read")
    place.unlink()
    assert opened(source).token_counts("train").sum() > 0
    assert place.read_bytes() == right
