"""Counts the tokens that the model has seen, and keeps the counts in the checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_danube.pretraining.ledger import SampleLedger
from lightning_danube.pretraining.position import curriculum_of
from lightning_danube.training.position import at_logged_step, place_in_tensorboard, speaks_for_replica, tensorboards
from lightning_danube.training.run_facts import run_facts_of
from lightning_danube.training.trackers.loss_curve import curve_of
from lightning_danube.training.trackers.pictures import Column, stacked_picture


class TokenLedger(Callback):
    """Counts the samples of the batches that the run has trained on, over all replicas, by stage and source.

    Logs `mix/<source>` (share of the tokens since the last logged step) and `tokens_seen/<source>` (of the whole run).
    TensorBoard gets a picture of all shares each time after all held-out rows are measured.
    """

    def __init__(self) -> None:
        self._ledger: SampleLedger | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return

        def sum_over_ranks(counts: Tensor) -> Tensor:
            counts = counts.to(trainer.strategy.root_device)
            if trainer.world_size > 1:
                torch.distributed.all_reduce(counts)
            return counts

        self._ledger = SampleLedger(curriculum_of(trainer)[1], sum_over_ranks)
        run_facts_of(pl_module).tokens_by_source = self._ledger.tokens_by_source

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._ledger is not None
        if speaks_for_replica(trainer):
            self._ledger.add(batch["keys"])
        if at_logged_step(trainer, batch_idx):
            values = self._ledger.values_to_log()
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or curve_of(pl_module).is_brief:
            return
        assert self._ledger is not None
        seen = self._ledger.tokens_by_source()  # every rank must call it
        for tensorboard in tensorboards(trainer):
            columns = [Column(*stage) for stage in zip(self._ledger.stages, seen, strict=True)]
            picture = stacked_picture(columns, "tokens")
            tensorboard.add_image("mix/seen", picture, place_in_tensorboard(trainer), dataformats="HWC")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        assert self._ledger is not None
        checkpoint["token_ledger"] = self._ledger.state()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("token_ledger")
        if saved is not None and self._ledger is not None:
            self._ledger.restore(saved)
