"""Checkpoints at optimizer steps and at the end of each stage."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from callbacks.position import curriculum_of, finished_stage, samples_done


class Checkpoints(Checkpoint):
    """Saves `checkpoints/step_<n>.ckpt` now and then and `checkpoints/stage_<k>_<name>_step_<n>.ckpt` for good.

    Only at optimizer steps: a checkpoint holds no half-accumulated gradient.

    Args:
        every_n_steps: optimizer steps between two of the former.
        keep: how many of them stay; those at the end of a stage all do.
    """

    def __init__(self, every_n_steps: int = 1000, keep: int = 1) -> None:
        if every_n_steps < 1 or keep < 1:
            raise ValueError(f"every_n_steps is {every_n_steps} and keep is {keep}: both must be at least 1")
        self.every_n_steps, self.keep = every_n_steps, keep
        self._directory: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            assert trainer.log_dir is not None
            self._directory = Path(trainer.log_dir) / "checkpoints"

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._directory is None:
            return
        step = trainer.global_step
        at_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        # The end of a stage is saved after its validation, so that a resumed run never leaves one out.
        if at_step and step % self.every_n_steps == 0 and finished_stage(trainer) is None:
            trainer.save_checkpoint(self._directory / f"step_{step:08d}.ckpt")
            if trainer.is_global_zero:
                for old in sorted(self._directory.glob("step_*.ckpt"))[: -self.keep]:
                    old.unlink()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or self._directory is None:
            return
        k = finished_stage(trainer)
        if k is not None:
            _, curriculum = curriculum_of(trainer)
            name = re.sub(r"[^\w.-]+", "-", curriculum.stages[k].name)
            step = trainer.global_step
            trainer.save_checkpoint(self._directory / f"stage_{k + 1}_{name}_step_{step:08d}.ckpt")
            if trainer.is_global_zero and samples_done(trainer) == curriculum.total_samples:
                for old in self._directory.glob("step_*.ckpt"):
                    old.unlink()
