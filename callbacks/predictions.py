"""Writes the results of `predict`, one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from lightning_danube.callbacks.progress import say
from lightning_danube.terminal import amount
from lightning_danube.training.position import speaks_for_replica


class Predictions(BasePredictionWriter):
    """Writes `predictions.jsonl` into the run's directory while predicting; with several ranks, one file a rank."""

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._file: Any = None
        self._path = Path()
        self._rows = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "predict":
            assert trainer.log_dir is not None
            suffix = f"-{trainer.global_rank:05d}" if trainer.world_size > 1 else ""
            self._path = Path(trainer.log_dir) / f"predictions{suffix}.jsonl"
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Written row by row under its name: a run that is stopped keeps the rows that it has made.
            self._file = self._path.open("w", encoding="utf-8")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        for row in prediction if speaks_for_replica(trainer) else ():
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
            self._rows += 1

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._file.close()
        where = self._path if trainer.world_size == 1 else f"{self._path} and those of the other ranks"
        say(trainer, f"{amount(self._rows, 'row')} written to {where}")
