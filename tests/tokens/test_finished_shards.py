"""Shards made elsewhere: fetched whole or not at all, read like any others, refused by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from lightning_danube.text.corpora import Source
from lightning_danube.tokens.finished_shards import fetch, finished_directory
from lightning_danube.tokens.preparation import open_or_prepare
from lightning_danube.tokens.shards import TokenShards
from lightning_danube.tokens.tokenizer import DocumentTokenizer

OPTIONS: dict[str, Any] = {"held_out": 0.2, "processes": 1}


@pytest.fixture(scope="module")
def tokenizer() -> DocumentTokenizer:
    return DocumentTokenizer()


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


def test_they_are_fetched_once_and_read_like_any_others(
    made: TokenShards, address: str, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    here = {"tokenizer": tokenizer, "cache_dir": tmp_path / "here", **OPTIONS}
    fetched, seconds = open_or_prepare("web", Source(address), **here)
    assert seconds > 0 and same(made, fetched) and fetched.directory.parent == tmp_path / "here" / "shards"
    # Not asked for again: the store may be gone.
    fsspec.filesystem("memory").store.clear()
    again, seconds = open_or_prepare("web", Source(address), **here)
    assert same(made, again) and seconds < 0.1
    assert [path.name for path in fetched.directory.parent.iterdir()] == [fetched.directory.name]


@pytest.mark.medium
def test_a_directory_of_shards_is_read_where_it_is(
    made: TokenShards, tokenizer: DocumentTokenizer, tmp_path: Path
) -> None:
    moved = tmp_path / "mounted" / "web"
    shutil.copytree(made.directory, moved)
    shards, _ = open_or_prepare("web", Source(str(moved)), tokenizer, cache_dir=tmp_path / "here", **OPTIONS)
    assert same(made, shards) and shards.directory == moved
    assert not list((tmp_path / "here").rglob("*.arrow"))


def test_what_was_fetched_before_a_stop_is_kept(made: TokenShards, address: str, tmp_path: Path) -> None:
    directory = finished_directory(address, tmp_path)
    hidden = directory.with_name(f".{directory.name}.fetching")
    hidden.mkdir(parents=True)
    whole, half = sorted(made.directory.glob("*.arrow"))
    shutil.copy(whole, hidden)
    (hidden / f".{half.name}.{'0' * 32}.partial").write_bytes(half.read_bytes()[:100])
    fsspec.filesystem("memory").rm(f"/bucket/web/{whole.name}")
    assert fetch("web", address, tmp_path) == directory
    assert {path.name for path in directory.iterdir()} == {path.name for path in made.directory.iterdir()} - {
        "report.json"
    }
    assert not hidden.exists()


def test_what_is_wrong_there_is_one_line_and_nothing_appears_here(
    made: TokenShards, address: str, tmp_path: Path
) -> None:
    store = fsspec.filesystem("memory")
    (file, *_) = sorted(made.directory.glob("*.arrow"))
    with store.open(f"/bucket/web/{file.name}", "wb") as damaged:
        damaged.write(file.read_bytes()[:-3] + b"xyz")
    expected = f"source 'web': {address}/{file.name} does not hold what was written"
    with pytest.raises(ValueError, match=expected):
        fetch("web", address, tmp_path)
    store.rm(f"/bucket/web/{file.name}")
    with pytest.raises(
        ValueError, match=f"lacks {file.name}, which its shards.json names: copy the shards there again"
    ):
        fetch("web", address, tmp_path)
    with store.open("/bucket/web/shards.json", "wb") as listing:
        listing.write(b"{")
    with pytest.raises(ValueError, match=r"shards\.json is damaged"):
        fetch("web", address, tmp_path)
    with pytest.raises(ValueError, match=r"source 'web': memory://bucket/other holds no shards\.json"):
        fetch("web", "memory://bucket/other", tmp_path)
    with pytest.raises(ValueError, match="no address that fsspec knows"):
        fetch("web", "nowhere://bucket/web", tmp_path)
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
        fetch("web", address, tmp_path / "here" / "cache")
    assert sorted(tmp_path.rglob("*")) == before
    (made.directory / "shards.json").write_text(json.dumps(listing))
    with pytest.raises(ValueError, match=r"shards\.json is damaged \(the name of a file is .*plain name\): delete"):
        TokenShards(made.directory, tokenizer)


def test_a_key_in_an_address_is_in_no_message_and_no_name(tmp_path: Path) -> None:
    address = "memory://me:secret-word@bucket/web?key=secret-word"
    assert "secret" not in str(finished_directory(address, tmp_path))
    with pytest.raises(ValueError, match=r"source 'web': memory://\*\*\*@bucket/web\?key=\*\*\*") as refused:
        fetch("web", address, tmp_path)
    assert "secret" not in str(refused.value)


def test_a_package_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ValueError, match=r"needs a package \(Install s3fs to access S3\); for s3://, type: .*\[s3\]"):
        fetch("web", "s3://bucket/web", tmp_path)
