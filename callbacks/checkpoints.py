"""Saves checkpoints at optimizer steps, at the end of each stage, and when the run stops early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_danube.checkpoints import EVERY_N_STEPS
from lightning_danube.checkpoints.files import prepare_directory
from lightning_danube.checkpoints.schedule import (
    CheckpointSchedule,
    RunSignals,
    StopAtStep,
    save,
    stage_checkpoint,
    step_checkpoint,
    validation_follows,
)
from lightning_danube.checkpoints.strategy import raise_failed_checkpoint, wait_for_checkpoint
from lightning_danube.pretraining.position import curriculum_of, finished_stage
from lightning_danube.signals import SIGNALS
from lightning_danube.training.position import is_done


class Checkpoints(Checkpoint):
    """Saves `checkpoints/step_<n>.ckpt`, and at the end of a stage `checkpoints/stage_<k>_<name>_step_<n>.ckpt`.

    A run is saved only at optimizer steps, so a checkpoint holds no half-accumulated gradient. On SIGTERM, SIGUSR1 and
    Ctrl-C the run saves at the next step, several ranks at the one after it, and ends with exit code 75. Under SLURM,
    SIGUSR1 requeues the job. A run that `trainer.max_steps`, `trainer.max_time` or a callback ends is saved, too.

    Args:
        every_n_steps: optimizer steps between two step checkpoints.
        keep: how many step checkpoints stay, beside those of stages. With 1, none is left if the only one is damaged.
    """

    def __init__(self, every_n_steps: int = EVERY_N_STEPS, keep: int = 2) -> None:
        self.every_n_steps, self.schedule = every_n_steps, CheckpointSchedule(every_n_steps, keep)
        self._directory: Path | None = None  # None: nothing is saved, as in a fast_dev_run
        self._signals = RunSignals()
        self._stop_at_step = StopAtStep()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            assert trainer.log_dir is not None
            self._directory = Path(trainer.log_dir) / "checkpoints"
            if trainer.is_global_zero:
                # Refuses a directory that cannot be written now, and not after the first hours.
                prepare_directory(self._directory)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._directory is not None:
            self._signals.hold(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        SIGNALS.all_done()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        SIGNALS.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        SIGNALS.release()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        raise_failed_checkpoint(trainer.strategy)
        # The run stops here and not where it was saved: now the last step has ended for all callbacks.
        if self._signals.stop_run:
            wait_for_checkpoint(trainer.strategy)
            raise self._signals.stopped(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._directory is None:
            return
        at_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        # All callbacks that may stop the run are called before this one.
        self._stop_at_step.move(trainer, at_step)
        # If a validation follows, the run is saved after it, so that a resumed run never leaves a validation out.
        if at_step and not validation_follows(trainer):
            self._save_if_due(trainer, self._directory)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or self._directory is None:
            return
        stage = finished_stage(trainer)
        if stage is None:
            self._save_if_due(trainer, self._directory, at_once=True)
            return
        name, done = curriculum_of(trainer)[1].stages[stage].name, is_done(trainer)
        path = stage_checkpoint(self._directory, stage, name, trainer.global_step)
        save(trainer, path, keep=0 if done else None, wait=done)
        if not done:
            self._signals.ask(at_once=True)

    def _save_if_due(self, trainer: Trainer, directory: Path, *, at_once: bool = False) -> None:
        step = trainer.global_step
        ends_here = trainer.should_stop or 0 <= trainer.max_steps <= step or is_done(trainer)
        due = ends_here or self.schedule.is_due(step)
        # A validation and a save have waited, or will wait, for the device in any case.
        self._signals.ask(at_once=at_once or due)
        if self._signals.stop_run or due:
            stops = ends_here or self._signals.stop_run
            save(trainer, step_checkpoint(directory, step), self.schedule.keep, wait=stops)
