"""Small data of two sources whose shards are made once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_danube.pretraining.curriculum import Stage
from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.text.corpora import Source
from tests.conftest import write_tiny


@pytest.fixture(scope="session")
def small_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("small"))


@pytest.fixture
def small_data(small_texts: Path) -> Callable[..., CurriculumData]:
    """Makes a data module from its options, ready for training."""

    def make(**options: Any) -> CurriculumData:
        arguments: dict[str, Any] = {
            "sources": {name: Source(str(small_texts / f"{name}.jsonl")) for name in ("web", "wiki")},
            "stages": [Stage("a", 5_000, {"web": 0.9, "wiki": 0.1}), Stage("b", 3_000, {"web": 0.5, "wiki": 0.5})],
            "tokenizer": "danube-small",
            "context_length": 16,
            "batch_tokens": 16 * 24,
            "micro_batch_size": 6,
            "held_out": 0.05,
            "cache_dir": str(small_texts / "cache"),
            "processes": 1,
        }
        module = CurriculumData(**arguments | options)
        module.prepare_data()
        module.setup("fit")
        return module

    return make
