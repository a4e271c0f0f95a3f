"""Texts whose shards are made once, and a SLURM that is started once, for all tests of this folder."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightning_danube.__main__ import main
from tests.cluster.slurm import Slurm
from tests.conftest import write_tiny


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny(tmp_path_factory.mktemp("texts"))
    assert main(["prepare", "--config", str(directory / "tiny.yaml")]) == 0
    return directory


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    # Not in pytest's directory: the path of a Unix socket has at most 107 bytes.
    with Slurm(Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))) as cluster:
        yield cluster
