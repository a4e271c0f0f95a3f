"""Checkpoints at optimizer steps, at the end of each stage, and where the run stops early."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment

from lightning_danube.checkpoints import EVERY_N_STEPS
from lightning_danube.checkpoints.files import prepare_directory
from lightning_danube.checkpoints.runs import read_step
from lightning_danube.checkpoints.strategy import ShardedStrategy
from lightning_danube.pretraining.position import curriculum_of, finished_stage
from lightning_danube.signals import EXIT_STOPPED, SIGNALS, Stopped, requeue_slurm_job
from lightning_danube.training.position import is_done


class Checkpoints(Checkpoint):
    """Saves `checkpoints/step_<n>.ckpt` now and then and `checkpoints/stage_<k>_<name>_step_<n>.ckpt` for good.

    Only at optimizer steps: a checkpoint holds no half-accumulated gradient. On SIGTERM, SIGUSR1 and Ctrl-C the run
    saves at the next one and ends with exit code 75; under SLURM, SIGUSR1 requeues the job as well. Where
    `trainer.max_steps`, `trainer.max_time` or a callback ends it, it is saved, too.

    Args:
        every_n_steps: optimizer steps between two of the former.
        keep: how many of them stay; those at the end of a stage all do. With one alone, there is no other to fall back
            on should it be damaged.
    """

    def __init__(self, every_n_steps: int = EVERY_N_STEPS, keep: int = 2) -> None:
        if every_n_steps < 1 or keep < 1:
            raise ValueError(f"every_n_steps is {every_n_steps} and keep is {keep}: both must be at least 1")
        self.every_n_steps, self.keep = every_n_steps, keep
        self._directory: Path | None = None  # None: nothing is kept, as in a fast_dev_run
        self._requeue_signal: int | None = None
        self._stopping = False
        self._stops_at_step = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            assert trainer.log_dir is not None
            self._directory = Path(trainer.log_dir) / "checkpoints"
            if trainer.is_global_zero:
                # A directory that can not be written is refused now, not after the first hours.
                prepare_directory(self._directory)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Replaces Lightning's handlers, where a program of the user's has a trainer of its own: Lightning's SIGTERM
        # leaves within an accumulation and saves nothing, its SLURM signal saves wherever the step happens to be.
        if self._directory is None:
            return
        self._stopping, self._requeue_signal = False, None
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = environment.requeue_signal
        # Windows has no SIGUSR1.
        signals = {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", None), self._requeue_signal}
        SIGNALS.hold(number for number in signals if number is not None)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        SIGNALS.all_done()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        SIGNALS.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        SIGNALS.release()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Here and not where it was saved: by now everybody's end of the last step is over.
        if self._stopping:
            wait_for_checkpoint(trainer)
            lines = [f"stopped after step {trainer.global_step}, saved: go on with --ckpt_path last"]
            if SIGNALS.received == self._requeue_signal and trainer.is_global_zero:
                lines.append(requeue_slurm_job())
            # A rank that rank zero has started, and that ends with another code than 0, counts as failed.
            raise Stopped("\n".join(lines), EXIT_STOPPED) if trainer.local_rank == 0 else Stopped("", 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._directory is None:
            return
        at_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if trainer.should_stop and not at_step:
            # A timer, or another callback: all of them come before this one.
            trainer.should_stop, self._stops_at_step = False, True
        elif self._stops_at_step and at_step:
            trainer.should_stop, self._stops_at_step = True, False
        # Where validation follows it is saved after that, so that a resumed run never leaves one out.
        if at_step and not validation_follows(trainer):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking or self._directory is None:
            return
        k = finished_stage(trainer)
        if k is None:
            self._save_if_due(trainer)
            return
        _, curriculum = curriculum_of(trainer)
        name = re.sub(r"[^\w.-]+", "-", curriculum.stages[k].name)
        trainer.save_checkpoint(self._directory / f"stage_{k + 1}_{name}_step_{trainer.global_step:08d}.ckpt")
        if is_done(trainer):
            wait_for_checkpoint(trainer)
            self._prune(trainer, keep=0)
        else:
            self._stopping = self._told_to_stop(trainer)

    def _save_if_due(self, trainer: Trainer) -> None:
        assert self._directory is not None
        step = trainer.global_step
        self._stopping = self._told_to_stop(trainer)
        ends_here = trainer.should_stop or 0 <= trainer.max_steps <= step
        if self._stopping or ends_here or step % self.every_n_steps == 0 or is_done(trainer):
            trainer.save_checkpoint(self._directory / f"step_{step:08d}.ckpt")
            self._prune(trainer, self.keep)

    def _prune(self, trainer: Trainer, keep: int) -> None:
        """Removes older checkpoints. One that is still being written has no name yet and does not count."""
        assert self._directory is not None
        # Later steps than this one are there when the run went back to before a damaged checkpoint: they count for
        # nothing, and would push out what is whole.
        done = [path for path in self._directory.glob("step_*.ckpt") if read_step(path) <= trainer.global_step]
        for old in sorted(done, key=read_step)[: len(done) - keep]:
            trainer.strategy.remove_checkpoint(old)

    def _told_to_stop(self, trainer: Trainer) -> bool:
        """Whether any rank was told to stop: a collective call."""
        told = SIGNALS.received is not None
        return trainer.strategy.reduce_boolean_decision(told, all=False) if trainer.world_size > 1 else told


def wait_for_checkpoint(trainer: Trainer) -> None:
    """Returns when the last checkpoint is on the disk: one of many ranks is written while training goes on."""
    if isinstance(trainer.strategy, ShardedStrategy):
        trainer.strategy.wait_for_checkpoint()


def validation_follows(trainer: Trainer) -> bool:
    """Whether the trainer validates after this micro-batch."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return trainer.enable_validation and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
