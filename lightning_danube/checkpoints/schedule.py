"""When a run is saved, the names of its checkpoints, which checkpoints stay, and how a signal ends the run."""

from __future__ import annotations

import re
import signal
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_danube.checkpoints import EVERY_N_STEPS, SaveInterval
from lightning_danube.checkpoints.content import all_finite
from lightning_danube.checkpoints.files import prepare_directory
from lightning_danube.checkpoints.runs import newest_checkpoint, read_step
from lightning_danube.checkpoints.strategy import checkpoint_in_progress, wait_for_checkpoint
from lightning_danube.signals import EXIT_STOPPED, SIGNALS, Stopped, requeue_slurm_job

SECONDS_TO_FIRST_SAVE = 300.0
"""After a start or a resume, a run is saved once when so much time has passed, unless it was saved before.

An interval of steps can last for hours, and a run that fails before its first checkpoint has made no progress.
"""


class RunLength(Protocol):
    """What a schedule needs to know of the run's data."""

    @property
    def batch_tokens(self) -> int: ...

    @property
    def total_tokens(self) -> int: ...


@dataclass(frozen=True)
class CheckpointSchedule:
    """When a run is saved, and which checkpoints stay.

    Args:
        interval: as the user states it.
        keep: number of newest checkpoints that stay. Checkpoints at the end of a stage all stay.
        every_n_steps: optimizer steps between two checkpoints, see `of_run`.

    Raises:
        ValueError: a number is below 1.
    """

    interval: SaveInterval
    keep: int
    every_n_steps: int = EVERY_N_STEPS

    def __post_init__(self) -> None:
        stated = self.interval.every_n_steps
        if self.keep < 1 or (stated is not None and stated < 1):
            raise ValueError(f"every_n_steps is {stated} and keep is {self.keep}: both must be at least 1")

    def of_run(self, length: RunLength) -> CheckpointSchedule:
        """Returns the schedule of a run whose length is known."""
        return replace(self, every_n_steps=self.interval.steps(length.total_tokens, length.batch_tokens))

    def is_due(self, step: int) -> bool:
        """Returns whether a run that continues is saved after this step."""
        return step % self.every_n_steps == 0


def step_checkpoint(directory: Path, step: int) -> Path:
    """Returns the path of the checkpoint after a step."""
    return directory / f"step_{step:08d}.ckpt"


def stage_checkpoint(directory: Path, stage: int, name: str, step: int) -> Path:
    """Returns the path of the checkpoint at the end of a stage.

    Args:
        stage: the stage's number, from 0.
    """
    name = re.sub(r"[^\w.-]+", "-", name)
    return directory / f"stage_{stage + 1}_{name}_step_{step:08d}.ckpt"


def older_checkpoints(directory: Path, step: int, keep: int, writing: Path | None = None) -> list[Path]:
    """Returns the step checkpoints to remove so that the newest `keep` stay.

    A checkpoint that is still being written has no final name yet. It counts only as `writing`, if the others are
    removed after it is complete. Checkpoints of later steps than
    `step` exist if the run restarted from before a damaged checkpoint. They do not count, because they would push out
    the undamaged checkpoints.
    """
    paths = {*directory.glob("step_*.ckpt"), *([writing] if writing is not None else [])}
    done = sorted((path for path in paths if path.match("step_*") and read_step(path) <= step), key=read_step)
    return done[: max(0, len(done) - keep)]


def remove_older(strategy: Strategy, directory: Path, step: int, keep: int) -> None:
    """Removes the step checkpoints that are older than the newest `keep`."""
    for old in older_checkpoints(directory, step, keep, checkpoint_in_progress(strategy)):
        strategy.remove_checkpoint(old)


def save(trainer: Trainer, path: Path, keep: int | None, *, wait: bool) -> None:
    """Saves a run, and removes the step checkpoints that are older than the newest `keep`.

    Args:
        keep: None: remove nothing.
        wait: return when the checkpoint is on disk, even if it is written while training continues.

    Raises:
        ValueError: the run has diverged. Its checkpoint would push out those from which it can resume.
    """
    _check_finite(trainer, path)
    trainer.save_checkpoint(path)
    if wait:
        wait_for_checkpoint(trainer.strategy)
    if keep is not None:
        remove_older(trainer.strategy, path.parent, trainer.global_step, keep)


def _check_finite(trainer: Trainer, path: Path) -> None:
    """Collective: every rank must call it, because each may have another part of the weights.

    Raises:
        ValueError: a trained weight is not finite.
    """
    finite = all(all_finite(one) for one in trainer.lightning_module.parameters() if one.requires_grad)
    if trainer.strategy.reduce_boolean_decision(finite):
        return
    last = newest_checkpoint(path.parent.parent)
    way_out = f"resume from {last}" if last else "begin again"
    raise ValueError(
        f"the run has diverged: after step {trainer.global_step} its weights are not finite. It ends here, and "
        f"this step is not saved; {way_out} with a lower model.learning_rate.peak, or with the callback SkipBadSteps"
    )


@runtime_checkable
class MayBeATrial(Protocol):
    """What Lightning's connectors set on a trainer; its class does not declare it."""

    fast_dev_run: bool | int


def is_trial(trainer: Trainer) -> bool:
    """Returns whether this is a fast_dev_run, which tries the first steps of a run and writes no result."""
    assert isinstance(trainer, MayBeATrial)
    return bool(trainer.fast_dev_run)


def checkpoint_directory(trainer: Trainer) -> Path | None:
    """Returns where a run saves its checkpoints; None in a fast_dev_run, which saves nothing.

    Rank zero makes the directory. So one that cannot be written is refused now, and not after the first hours.
    """
    if is_trial(trainer):
        return None
    assert trainer.log_dir is not None
    directory = Path(trainer.log_dir) / "checkpoints"
    if trainer.is_global_zero:
        prepare_directory(directory)
    return directory


class StopAtStep:
    """Delays a stop inside a gradient accumulation to the end of the optimizer step.

    A timer or a callback may request such a stop.
    """

    def __init__(self) -> None:
        self._waits = False

    def move(self, trainer: Trainer, batch_idx: int) -> bool:
        """Delays or applies a requested stop. Returns whether this micro-batch ended an optimizer step."""
        at_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if trainer.should_stop and not at_step:
            trainer.should_stop, self._waits = False, True
        elif self._waits and at_step:
            trainer.should_stop, self._waits = True, False
        return at_step


class Votes:
    """Agrees over all ranks on questions to which one rank may know the answer. The ranks do not wait for each other's
    steps.

    A vote is an asynchronous sum over the ranks' hosts. It does not pass through the devices, so no host waits for its
    device, which may be a step behind.

    Args:
        timeout: how long a rank waits for a vote of another rank.
    """

    def __init__(self, timeout: timedelta | None) -> None:
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._open: tuple[Tensor, dist.Work] | None = None

    def cast(self, stop: bool, save: bool, *, at_once: bool) -> tuple[bool, bool]:
        """Casts this rank's vote, and returns the result of the vote before it. Collective: every rank must call it.

        No vote is cast if the result is that the run stops.

        Args:
            stop: whether this rank was told to stop.
            save: whether this rank's clock says that the run is to be saved.
            at_once: wait for the result of this vote, too.

        Returns:
            For both, whether any rank says so.
        """
        stops, saves = self._result()
        if stops:
            return True, saves
        counts = torch.tensor([int(stop), int(save)])
        work = dist.all_reduce(counts, group=self._group, async_op=True)
        assert work is not None
        self._open = counts, work
        if at_once:
            stops, saves = (before or now for before, now in zip((stops, saves), self._result(), strict=True))
        return stops, saves

    def _result(self) -> tuple[bool, bool]:
        if self._open is None:
            return False, False
        (counts, work), self._open = self._open, None
        work.wait()
        stop, save = counts.tolist()
        return stop > 0, save > 0


class RunSignals:
    """What ends or saves a run after an optimizer step that no schedule knows: a signal, and the time since the start.

    The signals are SIGTERM, SIGUSR1, Ctrl-C and SLURM's requeue signal. With several ranks, the run ends one step later
    than with one: see `Votes`.
    """

    def __init__(self) -> None:
        self.stop_run = False
        """Whether the run ends before its next step, as of the last call of `ask`."""
        self.first_save = False
        """Whether the run's first save since its start is due by the time, as of the last call of `ask`."""
        self.saved = False
        """Whether the run was saved since its start."""
        self._began = time.monotonic()
        self._requeue: int | None = None
        self._votes: Votes | None = None

    def hold(self, trainer: Trainer) -> None:
        """Records the signals from now on, instead of ending the process. Collective: every rank must call it.

        This replaces Lightning's handlers if a user's program has a trainer of its own. Lightning's SIGTERM handler
        ends the run within an accumulation and saves nothing. Its SLURM handler saves in the middle of a step.
        """
        self.stop_run = self.first_save = self.saved = False
        self._requeue, self._began = None, time.monotonic()
        self._votes = Votes(getattr(trainer.strategy, "_timeout", None)) if trainer.world_size > 1 else None
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = environment.requeue_signal
        # Windows has no SIGUSR1.
        numbers = {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGUSR1", None), self._requeue}
        SIGNALS.hold(number for number in numbers if number is not None)

    def ask(self, *, at_once: bool = False) -> None:
        """Sets `stop_run` to whether any rank has received a signal, and `first_save`. Collective: every rank must call
        it.

        Args:
            at_once: with several ranks, also count signals since the last call. Waits for the other ranks.
        """
        told = SIGNALS.received is not None
        late = not self.saved and time.monotonic() - self._began >= SECONDS_TO_FIRST_SAVE
        if self._votes is not None:
            told, late = self._votes.cast(told, late, at_once=at_once)
        # A vote may be as old as the step before the last save, in which all ranks took part.
        self.stop_run, self.first_save = told, late and not self.saved

    def stop(self, trainer: Trainer) -> None:
        """Ends the run, if `ask` has heard of a signal, when its last checkpoint is on disk.

        Raises:
            Stopped: a signal was received.
        """
        if self.stop_run:
            wait_for_checkpoint(trainer.strategy)
            stopped = self._stopped(trainer)
            SIGNALS.stop_with_others()
            raise stopped

    def _stopped(self, trainer: Trainer) -> Stopped:
        """Returns the exception that ends a saved run. Requeues the SLURM job if SLURM's signal was received."""
        lines = []
        if trainer.is_global_zero:  # which speaks for the other nodes
            lines.append(f"stopped after step {trainer.global_step}, saved: resume with --ckpt_path last")
            if SIGNALS.received == self._requeue:
                lines.append(requeue_slurm_job())
        # A rank that rank zero started counts as failed if its exit code is not 0.
        return Stopped("\n".join(lines), EXIT_STOPPED) if trainer.local_rank == 0 else Stopped("", 0)


def save_if_due(
    trainer: Trainer,
    directory: Path,
    schedule: CheckpointSchedule,
    signals: RunSignals,
    *,
    ends_here: bool,
    at_once: bool = False,
) -> None:
    """Saves a run after this step if the schedule or the time since its start says so, if it ends here, or if a signal
    ends it.

    Args:
        at_once: see `RunSignals.ask`.
    """
    step = trainer.global_step
    due = ends_here or schedule.is_due(step)
    # A validation and a save have waited, or will wait, for the device in any case.
    signals.ask(at_once=at_once or due)
    if signals.stop_run or signals.first_save or due:
        signals.saved = True
        save(trainer, step_checkpoint(directory, step), schedule.keep, wait=ends_here or signals.stop_run)


def save_stage(trainer: Trainer, directory: Path, signals: RunSignals, stage: int, name: str, *, is_last: bool) -> None:
    """Saves a run at the end of a stage. No step checkpoint stays beside the checkpoint of the last stage.

    Args:
        signals: asked afterwards, unless the run is done.
        stage: the stage's number, from 0.
    """
    path = stage_checkpoint(directory, stage, name, trainer.global_step)
    signals.saved = True
    save(trainer, path, keep=0 if is_last else None, wait=is_last)
    if not is_last:
        signals.ask(at_once=True)


def validation_follows(trainer: Trainer) -> bool:
    """Returns whether the trainer validates after this micro-batch."""
    loop = trainer.fit_loop
    assert loop._data_fetcher is not None
    return trainer.enable_validation and loop.epoch_loop._should_check_val_fx(loop._data_fetcher)
