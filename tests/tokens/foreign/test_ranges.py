"""Token files behind an address of fsspec: the same ids, by range, with a cache that does not grow without end."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from lightning_danube.tokens.foreign.listing import ForeignTokens
from lightning_danube.tokens.foreign.range_cache import RangeCache
from tests.tokens.foreign.written import FILES, ids_of_documents

Open = Callable[..., ForeignTokens]
IDS = [index for document in ids_of_documents() for index in document]


@pytest.fixture
def store() -> Iterator[Any]:
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.put(f"{FILES}/", "/bucket/", recursive=True)
    yield store
    store.store.clear()


@pytest.mark.parametrize(
    "path",
    ["datatrove/*.ds", "megatron/wide.bin", "olmo/narrow.npy", "mosaic/ragged/index.json", "mosaic/*/index.json"],
)
def test_an_address_holds_the_ids_of_the_files(path: str, store: Any, opened: Open, files: Path) -> None:
    if path == "mosaic/*/index.json":  # several streams
        for place in ("mosaic/packed", "mosaic/bytes"):
            store.rm(f"/bucket/{place}", recursive=True)
        for file in [*(files / "mosaic" / "packed").iterdir(), *(files / "mosaic" / "bytes").iterdir()]:
            file.unlink()
    here, there = opened(files / path), opened(f"memory://bucket/{path}")
    for split in ("train", "validation"):
        a, b = here.tokens(split), there.tokens(split)
        assert len(a) == len(b) > 0
        assert np.array_equal(a.read(0, len(a)), b.read(0, len(b)))
    assert here.counts("train") == there.counts("train")
    assert there.verify() == here.verify()


def test_a_range_is_asked_for_once(store: Any, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = opened("memory://bucket/megatron/narrow.bin").tokens("train")
    asked: list[Any] = []
    real = type(store).cat_file

    def noted(self: Any, path: str, start: int | None = None, end: int | None = None) -> Any:
        asked.append((start, end))
        return real(self, path, start=start, end=end)

    monkeypatch.setattr(type(store), "cat_file", noted)
    for _ in range(2):
        assert tokens.read(50, 83).tolist() == IDS[50:83]
    assert asked == [(100, 166)]
    # Another process, or a resumed run, finds it on the disk.
    again = opened("memory://bucket/megatron/narrow.bin").tokens("train")
    assert again.read(50, 83).tolist() == IDS[50:83] and asked == [(100, 166)]


def test_what_is_missing_or_cut_off_is_named_without_keys(store: Any, opened: Open) -> None:
    with pytest.raises(ValueError, match="source 'books': there is no file memory://bucket/none/"):
        opened("memory://bucket/none/*.ds")
    tokens = opened("memory://bucket/olmo/narrow.npy").tokens("train")
    store.pipe_file("/bucket/olmo/narrow.npy", b"12345678")
    with pytest.raises(ValueError, match=r"narrow.npy ends at byte 8, and byte 24 was asked for: the file was cut off"):
        tokens.read(3, 12)
    store.rm("/bucket/olmo/narrow.npy")
    with pytest.raises(ValueError, match=r"memory://bucket/olmo/narrow.npy is missing: copy it there again"):
        tokens.read(100, 200)


def test_a_store_that_fails_is_told(store: Any, opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = opened("memory://bucket/olmo/narrow.npy").tokens("train")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr(type(store), "cat_file", fail)
    with pytest.raises(ValueError, match=r"olmo/narrow.npy cannot be read \(no route to host\)"):
        tokens.read(100, 200)
    monkeypatch.setattr(type(store), "glob", fail)
    with pytest.raises(
        ValueError, match=r"source 'books': memory://bucket/olmo/\*.npy cannot be read \(no route to host\)"
    ):
        opened("memory://bucket/olmo/*.npy")


def test_the_cache_stays_within_its_size_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, most_bytes=64 * 100)
    content = {str(number): bytes([number]) * 100 for number in range(200)}
    for number, (key, value) in enumerate(content.items()):
        cache.put(key, value)
        os.utime(cache._path(key), ns=(number, number))
        if number:
            assert cache.get("0") == content["0"]  # used again and again
        assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 64 * 100 + 104
    assert cache.get("0") == content["0"] and cache.get("1") is None and cache.get("199") == content["199"]


def test_a_damaged_range_is_asked_for_again(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path)
    cache.put("a", b"0123456789")
    (file,) = tmp_path.iterdir()
    for damaged in (b"", b"0123", b"012345678X" + file.read_bytes()[-4:]):
        file.write_bytes(damaged)
        assert cache.get("a") is None
