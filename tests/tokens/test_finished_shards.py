"""Shards made elsewhere: read like any others, at an address by ranges, and refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from lightning_danube.text.corpora import Source
from lightning_danube.tokens.finished_shards import fetch_listing, finished_directory
from lightning_danube.tokens.preparation import open_or_prepare
from lightning_danube.tokens.shards import TokenShards
from lightning_danube.tokens.tokenizer import DocumentTokenizer

OPTIONS: dict[str, Any] = {"held_out": 0.2, "processes": 1}


@pytest.fixture(scope="module")
def tokenizer() -> DocumentTokenizer:
    return DocumentTokenizer("danube-small")


@pytest.fixture
def made(tmp_path: Path, tokenizer: DocumentTokenizer) -> TokenShards:
    text = tmp_path / "texts.jsonl"
    text.write_text("".join(json.dumps({"text": f"the river {n} walks slowly"}) + "\n" for n in range(60)))
    shards, _ = open_or_prepare("web", Source(str(text)), tokenizer, cache_dir=tmp_path / "there", **OPTIONS)
    assert isinstance(shards, TokenShards)
    return shards


@pytest.fixture
def address(made: TokenShards) -> str:
    """Where a copy of them lies in a store that is the memory of this process."""
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.put(f"{made.directory}/", "/bucket/web/", recursive=True)
    return "memory://bucket/web"


def same(a: TokenShards, b: object) -> bool:
    assert isinstance(b, TokenShards)
    streams = [(one.tokens(split), two.tokens(split)) for one, two in [(a, b)] for split in ("train", "validation")]
    return all(np.array_equal(x.read(0, len(x)), y.read(0, len(y))) and len(x) > 0 for x, y in streams)


def opened(address: str, tokenizer: DocumentTokenizer, cache_dir: Path) -> TokenShards:
    shards, _ = open_or_prepare("web", Source(address), tokenizer, cache_dir=cache_dir, **OPTIONS)
    assert isinstance(shards, TokenShards)
    return shards


def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None, int | None]]:
    """Returns the list of the requests to the store: name of the file, first byte, last byte."""
    requests: list[tuple[str, int | None, int | None]] = []
    store = type(fsspec.filesystem("memory"))
    real = store.cat_file

    def noted(self: Any, path: str, start: int | None = None, end: int | None = None) -> Any:
        requests.append((Path(path).name, start, end))
        return real(self, path, start=start, end=end)

    monkeypatch.setattr(store, "cat_file", noted)
    return requests


def test_only_the_listing_and_the_rows_that_are_read_are_fetched(
    made: TokenShards, address: str, tokenizer: DocumentTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = asked(monkeypatch)
    there = opened(address, tokenizer, tmp_path / "here")
    there.check_sizes()
    counts = [f"{split}-token-counts.npy" for split in ("train", "validation")]
    assert sorted(name for name, *_ in requests) == ["shards.json", *counts]
    assert {path.name for path in there.directory.iterdir()} == {"shards.json", *counts}
    requests.clear()
    row, here = there.tokens("train").row(3, 16), made.tokens("train").row(3, 16)
    assert row.tolist() == here.tolist()
    ((name, begin, end),) = requests
    assert name == "train-00000.arrow" and begin is not None and end == begin + 17 * row.dtype.itemsize
    assert np.array_equal(there.token_counts("train"), made.token_counts("train"))
    there.verify()
    assert same(made, there)


def test_what_was_read_is_not_asked_for_again(
    made: TokenShards, address: str, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    there = opened(address, tokenizer, tmp_path / "here")
    assert same(made, there)
    fsspec.filesystem("memory").store.clear()
    again = opened(address, tokenizer, tmp_path / "here")
    assert same(made, again) and again.place == address
    with pytest.raises(ValueError, match=f"{address}/train-00000.arrow is missing: copy it there again"):
        again.tokens("train").row(3, 16)
    with pytest.raises(ValueError, match=f"{address}/.* is missing: copy it there again"):
        again.check_sizes()


@pytest.mark.medium
def test_a_directory_of_shards_is_read_where_it_is(
    made: TokenShards, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    moved = tmp_path / "mounted" / "web"
    shutil.copytree(made.directory, moved)
    shards, _ = open_or_prepare("web", Source(str(moved)), tokenizer, cache_dir=tmp_path / "here", **OPTIONS)
    assert same(made, shards) and shards.directory == moved
    assert not list((tmp_path / "here").rglob("*.arrow"))


def test_what_is_wrong_there_is_one_line(
    made: TokenShards, address: str, tokenizer: DocumentTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the run, by sizes, and by checksums on demand."""
    store = fsspec.filesystem("memory")
    there = opened(address, tokenizer, tmp_path)
    (file, *_) = sorted(made.directory.glob("*.arrow"))
    content = file.read_bytes()
    store.pipe_file(f"/bucket/web/{file.name}", content[:-3] + b"xyz")
    there.check_sizes()
    remedy = f"copy the shards there again; if other shards are there now, delete {there.directory}"
    with pytest.raises(ValueError, match=f"{address}/{file.name} does not hold what was written .*: {remedy}"):
        there.verify()
    store.pipe_file(f"/bucket/web/{file.name}", content[:-3])
    with pytest.raises(ValueError, match=f"{file.name} has {len(content) - 3} bytes instead of {len(content)}: copy"):
        there.check_sizes()
    # A store that lists no sizes is asked for each file.
    monkeypatch.setattr(type(store), "ls", lambda *_, **__: [{"name": f"/bucket/web/{file.name}", "size": None}])
    with pytest.raises(ValueError, match=f"{file.name} has {len(content) - 3} bytes instead of {len(content)}: copy"):
        there.check_sizes()
    store.rm_file(f"/bucket/web/{file.name}")
    with pytest.raises(ValueError, match=f"{address}/{file.name} is missing: copy it there again"):
        there.check_sizes()


def test_an_id_outside_the_vocabulary_is_named_with_its_address(
    made: TokenShards, address: str, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    place = f"/bucket/web/{sorted(made.directory.glob('train-*.arrow'))[0].name}"
    store = fsspec.filesystem("memory")
    content = bytearray(store.cat_file(place))
    (offset, _), *_ = made.meta["splits"]["train"]["files"][0]["segments"]
    content[offset + 2 * 5 : offset + 2 * 6] = b"\xff\xff"
    store.pipe_file(place, bytes(content))
    with pytest.raises(ValueError, match=rf"{address}/train-\d+.arrow is damaged: token 5 of it is 65535, .*: copy"):
        opened(address, tokenizer, tmp_path).tokens("train").row(0, 16)


def test_a_server_without_ranges_is_told(
    made: TokenShards, address: str, tokenizer: DocumentTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = opened(address, tokenizer, tmp_path)
    store = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(store, "cat_file", lambda self, path, **_: self.store[self._strip_protocol(path)].getvalue())
    with pytest.raises(ValueError, match=r"train-00000.arrow: the server sends the whole file and no ranges: copy"):
        there.tokens("train").row(0, 16)


def test_a_listing_that_is_missing_or_damaged_is_one_line_and_nothing_appears_here(
    made: TokenShards, address: str, tmp_path: Path
) -> None:
    store = fsspec.filesystem("memory")
    counts = "/bucket/web/train-token-counts.npy"
    content = store.cat_file(counts)
    store.pipe_file(counts, content[:-1] + b"x")
    expected = f"source 'web': {address}/train-token-counts.npy does not hold what was written"
    with pytest.raises(ValueError, match=expected):
        fetch_listing("web", address, tmp_path)
    store.rm(counts)
    with pytest.raises(
        ValueError, match=r"lacks train-token-counts.npy, which its shards.json names: copy the shards there again"
    ):
        fetch_listing("web", address, tmp_path)
    with store.open("/bucket/web/shards.json", "wb") as listing:
        listing.write(b"{")
    with pytest.raises(ValueError, match=r"shards\.json is damaged"):
        fetch_listing("web", address, tmp_path)
    with pytest.raises(ValueError, match=r"source 'web': memory://bucket/other holds no shards\.json"):
        fetch_listing("web", "memory://bucket/other", tmp_path)
    with pytest.raises(ValueError, match="not an address that fsspec knows"):
        fetch_listing("web", "nowhere://bucket/web", tmp_path)
    assert not finished_directory(address, tmp_path).exists()


@pytest.mark.parametrize("name", ["../../outside.arrow", "/tmp/outside.arrow", "..", "", "a\nb.arrow", 5, None])
def test_a_listing_writes_and_reads_nothing_outside_its_directory(
    name: object, made: TokenShards, address: str, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    """By a listing of the store, and by one of a directory here."""
    listing = json.loads((made.directory / "shards.json").read_text())
    listing["splits"]["train"]["files"][0]["name"] = name
    with fsspec.filesystem("memory").open("/bucket/web/shards.json", "wb") as remote:
        remote.write(json.dumps(listing).encode())
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"shards\.json is damaged \(the name of a file is .*plain name\): copy"):
        fetch_listing("web", address, tmp_path / "here" / "cache")
    assert sorted(tmp_path.rglob("*")) == before
    (made.directory / "shards.json").write_text(json.dumps(listing))
    with pytest.raises(ValueError, match=r"shards\.json is damaged \(the name of a file is .*plain name\): delete"):
        TokenShards(made.directory, tokenizer)


def test_a_key_in_an_address_is_in_no_message_and_no_name(tmp_path: Path) -> None:
    address = "memory://me:secret-word@bucket/web?key=secret-word"
    assert "secret" not in str(finished_directory(address, tmp_path))
    with pytest.raises(ValueError, match=r"source 'web': memory://\*\*\*@bucket/web\?key=\*\*\*") as refused:
        fetch_listing("web", address, tmp_path)
    assert "secret" not in str(refused.value)


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ValueError, match=r"needs a package \(Install s3fs to access S3\); for s3://, type: .*\[s3\]"):
        fetch_listing("web", "s3://bucket/web", tmp_path)
