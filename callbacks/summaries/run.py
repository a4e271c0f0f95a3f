"""What the summaries of training runs share: the run's clock, and writing `summary.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_danube.callbacks.progress import say
from lightning_danube.checkpoints.schedule import is_trial
from lightning_danube.checkpoints.strategy import wait_for_checkpoint
from lightning_danube.files import write_json
from lightning_danube.terminal import amount
from lightning_danube.training.position import run_directory
from lightning_danube.training.run_facts import RunClock, Trained


class RunSummary(Callback):
    """A callback that counts the seconds of a run over all its sessions, and keeps them in the checkpoint."""

    def __init__(self) -> None:
        self._clock = RunClock()
        self._first_step: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._was_complete(trainer):
            wait_for_checkpoint(trainer.strategy)  # the report says whether there is one
            self._report_fit(trainer, pl_module)

    def _report_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes and prints the result of `fit`. All ranks call it."""
        raise NotImplementedError

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning leaves these two out if the checkpoint was saved at the end of the run's last epoch.
        if self._first_step is None:
            self.on_train_start(trainer, pl_module)
            self.on_train_end(trainer, pl_module)

    def _was_complete(self, trainer: Trainer) -> bool:
        """Whether an earlier session did all steps and wrote its summary, which stays. Says so. All ranks must call it.

        If that session was killed between its last checkpoint and its summary, this measures the held-out rows, for the
        summary that is missing.
        """
        if trainer.global_step == 0 or trainer.global_step != self._first_step:
            return False
        run = run_directory(trainer)
        if trainer.strategy.broadcast((run / "summary.json").exists()):
            say(trainer, f"{run} is complete: {amount(trainer.global_step, 'step')}; nothing is left to do")
            return True
        validation = trainer.fit_loop.epoch_loop.val_loop
        validation.restarting = False  # it would leave out the batches that the earlier session's last point measured
        trainer.validating = True
        validation.run()
        trainer.training = True
        return False

    def _trained(self, trainer: Trainer) -> Trained:
        return Trained(trainer.global_step, trainer.precision, self._clock.seconds())

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._clock.seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._clock.resume(state_dict["seconds"])


def reports_fit(trainer: Trainer) -> bool:
    """Whether this rank writes the result of the run: rank zero does, except in a fast_dev_run."""
    return trainer.is_global_zero and not is_trial(trainer)


def write_summary(trainer: Trainer, summary: Mapping[str, Any]) -> Path:
    """Writes `summary.json` into the run's directory, and returns that directory. Only rank zero may call it."""
    directory = run_directory(trainer)
    write_json(directory / "summary.json", dict(summary))
    return directory


def report_evaluation(trainer: Trainer, summary: Mapping[str, Any], table: str) -> None:
    """Writes the result of `validate` or `test` and prints its table, on rank zero."""
    if trainer.is_global_zero:
        directory = write_summary(trainer, summary)
        say(trainer, table)
        say(trainer, f"written to {directory / 'summary.json'}")
