"""Saves checkpoints at optimizer steps, at the end of each stage, and when the run stops early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_danube.checkpoints import SaveInterval
from lightning_danube.checkpoints.schedule import (
    CheckpointSchedule,
    RunSignals,
    StopAtStep,
    checkpoint_directory,
    save_if_due,
    save_stage,
    validation_follows,
)
from lightning_danube.checkpoints.strategy import raise_failed_checkpoint
from lightning_danube.options import Length
from lightning_danube.pretraining.position import curriculum_of, finished_stage
from lightning_danube.signals import SIGNALS
from lightning_danube.training.position import ends_after_this_step, is_done, training_data_of


class Checkpoints(Checkpoint):
    """Saves `checkpoints/step_<n>.ckpt`, and at the end of a stage `checkpoints/stage_<k>_<name>_step_<n>.ckpt`.

    A run is saved only at optimizer steps, so a checkpoint holds no half-accumulated gradient. On SIGTERM, SIGUSR1 and
    Ctrl-C the run saves at the next step, several ranks at the one after it, and ends with exit code 75. Under SLURM,
    SIGUSR1 requeues the job. A run that `trainer.max_steps`, `trainer.max_time` or a callback ends is saved, too. Five
    minutes after each start, a run that was not saved since is saved once.

    Args:
        every_n_steps: optimizer steps between two step checkpoints; 1,000 by default.
        save_every: the tokens ("100M") or the share of the run ("5 %") between them, in place of `every_n_steps`.
        keep: how many step checkpoints stay, beside those of stages. With 1, none is left if the only one is damaged.
    """

    def __init__(self, every_n_steps: int | None = None, keep: int = 2, save_every: Length | None = None) -> None:
        self.schedule = CheckpointSchedule(SaveInterval(every_n_steps, save_every), keep)
        self._directory: Path | None = None  # None: nothing is saved, as in a fast_dev_run
        self._signals, self._stop_at_step = RunSignals(), StopAtStep()
        self._is_new = False  # whether this session has trained, so that there is something to save

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._directory, self._is_new = checkpoint_directory(trainer), False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._directory is not None:
            self.schedule = self.schedule.of_run(training_data_of(trainer))
            self._signals.hold(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        SIGNALS.all_done()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        SIGNALS.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        SIGNALS.release()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._is_new = True
        raise_failed_checkpoint(trainer.strategy)
        # The run stops here and not where it was saved: now the last step has ended for all callbacks.
        self._signals.stop(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # All callbacks that may stop the run are called before this one.
        at_step = self._stop_at_step.move(trainer, batch_idx)
        # If a validation follows, the run is saved after it, so that a resumed run never leaves a validation out.
        if self._directory is not None and at_step and not validation_follows(trainer):
            self._save_if_due(trainer, self._directory)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A complete run whose summary is missing measures its last loss again. Its checkpoint stays as it is.
        if trainer.state.fn != "fit" or trainer.sanity_checking or self._directory is None or not self._is_new:
            return
        if (stage := finished_stage(trainer)) is None:
            return self._save_if_due(trainer, self._directory, at_once=True)
        name = curriculum_of(trainer)[1].stages[stage].name
        save_stage(trainer, self._directory, self._signals, stage, name, is_last=is_done(trainer))

    def _save_if_due(self, trainer: Trainer, directory: Path, *, at_once: bool = False) -> None:
        ends = ends_after_this_step(trainer)
        save_if_due(trainer, directory, self.schedule, self._signals, ends_here=ends, at_once=at_once)
