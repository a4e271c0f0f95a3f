"""Texts whose shards are made once, for all runs of this folder."""

from pathlib import Path

import pytest

from lightning_danube.__main__ import main
from tests.conftest import write_tiny


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_tiny(tmp_path_factory.mktemp("texts"))
    assert main(["prepare", "--config", str(directory / "tiny.yaml")]) == 0
    return directory
