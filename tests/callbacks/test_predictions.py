"""Which rank writes which rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_danube.callbacks import Predictions
from lightning_danube.training.task import DecoderTask


@pytest.mark.parametrize(
    ("rank", "world", "replicas", "file", "written"),
    [
        (0, 1, 1, "predictions.jsonl", True),
        (0, 2, 2, "predictions-00000.jsonl", True),
        (1, 2, 2, "predictions-00001.jsonl", True),
        (1, 2, 1, "predictions-00001.jsonl", False),
        (2, 4, 2, "predictions-00002.jsonl", True),
        (3, 4, 2, "predictions-00003.jsonl", False),
    ],
)
def test_each_replica_writes_its_rows_once(
    rank: int, world: int, replicas: int, file: str, written: bool, trainer: Any, task: DecoderTask, tmp_path: Path
) -> None:
    trainer.global_rank, trainer.world_size, trainer.is_global_zero = rank, world, rank == 0
    trainer.distributed_sampler_kwargs = {"num_replicas": replicas, "rank": rank * replicas // world}
    predictions = Predictions()
    predictions.setup(trainer, task, "predict")
    rows = [{"row": 1, "text": "é"}, {"row": 2, "text": "b"}]
    predictions.write_on_batch_end(trainer, task, rows, None, None, 0, 0)
    predictions.on_predict_end(trainer, task)
    (path,) = tmp_path.iterdir()
    assert path.name == file
    assert [json.loads(line) for line in path.read_text("utf-8").splitlines()] == (rows if written else [])
