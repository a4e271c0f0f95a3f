"""The comparison of shard files: what it writes are shards, and what it reads are rows of them."""

from pathlib import Path
from typing import Any

import pytest

from lightning_danube.tokens.shards import TokenShards
from lightning_danube.tokens.tokenizer import DocumentTokenizer


@pytest.fixture
def shard_files(benchmarks_on_path: None) -> Any:
    import shard_files

    return shard_files


@pytest.mark.parametrize("files", [1, 4])
def test_sparse_files_are_shards_of_the_tokens(shard_files: Any, tmp_path: Path, files: int) -> None:
    shard_files.write_sparse_shards(tmp_path / "shards", {"train": files, "validation": 1}, (1 << 26) // files)
    shards = TokenShards(tmp_path / "shards", DocumentTokenizer("danube-small"))
    shards.check_sizes()
    stream = shards.tokens("train")
    assert len(stream) == 1 << 26 and stream.read((1 << 26) - 5, 1 << 26).tolist() == [0] * 5
    assert len(list((tmp_path / "shards").glob("train-*.arrow"))) == files
    assert shard_files.read(tmp_path / "shards").keys() == {"open", "row", "mib"}
