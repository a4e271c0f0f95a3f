"""Counts which tokens the model has seen: a ledger by stage and source, kept in the checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_danube.pretraining.position import curriculum_of
from lightning_danube.training.position import at_logged_step, speaks_for_replica


class TokenLedger(Callback):
    """Counts the samples of the batches that were really trained on, over all replicas.

    Logs `mix/<source>` (share of the tokens since the last logged step) and `tokens_seen/<source>` (of the whole run).
    """

    def __init__(self) -> None:
        self._samples: Tensor | None = None  # (stages, sources), all replicas, at the last synchronisation
        self._since: Tensor | None = None  # the same, this replica, since then
        self._logged: Tensor | None = None  # (sources,), at the last logged step
        self._sources: list[str] = []
        self._stages: list[str] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        _, curriculum = curriculum_of(trainer)
        self._sources = list(curriculum.sources)
        self._stages = [s.name for s in curriculum.stages]
        self._samples = torch.zeros(len(self._stages), len(self._sources), dtype=torch.int64)
        self._since = torch.zeros_like(self._samples)
        self._logged = torch.zeros(len(self._sources), dtype=torch.int64)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._since is not None
        for key in batch["keys"] if speaks_for_replica(trainer) else ():
            self._since[key.stage, key.source] += 1
        if at_logged_step(trainer, batch_idx):
            self._log(trainer)

    def samples(self, trainer: Trainer) -> Tensor:
        """Samples seen, (stages, sources); a collective call: every rank has to make it."""
        assert self._samples is not None and self._since is not None
        since = self._since.to(trainer.strategy.root_device)
        if trainer.world_size > 1:
            torch.distributed.all_reduce(since)
        self._samples += since.cpu()
        self._since.zero_()
        return self._samples

    def tokens_by_source(self, trainer: Trainer) -> list[dict[str, int]]:
        """Tokens seen in each stage from each source."""
        data, _ = curriculum_of(trainer)
        return [
            {name: int(n) * data.context_length for name, n in zip(self._sources, row, strict=True)}
            for row in self.samples(trainer).tolist()
        ]

    def _log(self, trainer: Trainer) -> None:
        data, _ = curriculum_of(trainer)
        seen = self.samples(trainer).sum(0)
        assert self._logged is not None
        since, self._logged = seen - self._logged, seen
        values = {f"mix/{name}": float(n / since.sum()) for name, n in zip(self._sources, since, strict=True)}
        values |= {
            f"tokens_seen/{name}": float(n * data.context_length) for name, n in zip(self._sources, seen, strict=True)
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        data, _ = curriculum_of(trainer)
        assert self._logged is not None
        checkpoint["token_ledger"] = {
            "stages": self._stages,
            "sources": self._sources,
            "samples": self.samples(trainer).clone(),
            "context_length": data.context_length,
            "logged": dict(zip(self._sources, self._logged.tolist(), strict=True)),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("token_ledger")
        if saved is None or self._samples is None:
            return
        assert self._since is not None
        self._since.zero_()
        self._samples.zero_()
        self._logged = torch.tensor([saved["logged"].get(name, 0) for name in self._sources])
        # By name: a changed config may have other stages ahead, and sources that only they draw from.
        for k, s in saved["samples"].nonzero().tolist():
            stage, source = saved["stages"][k], saved["sources"][s]
            if stage not in self._stages or source not in self._sources:
                raise ValueError(
                    f"the checkpoint counted tokens of source {source!r} in stage {stage!r}, the config has the stages "
                    f"{self._stages} and the sources {self._sources}: what has begun keeps its name"
                )
            self._samples[self._stages.index(stage), self._sources.index(source)] = saved["samples"][k, s]
