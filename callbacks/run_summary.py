"""What the summaries of training runs share: the run's clock, and writing `summary.json`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_danube.callbacks.progress import say
from lightning_danube.checkpoints.schedule import is_trial
from lightning_danube.files import write_json
from lightning_danube.training.position import run_directory
from lightning_danube.training.run_facts import RunClock, Trained


class RunSummary(Callback):
    """A callback that counts the seconds of a run over all its sessions, and keeps them in the checkpoint."""

    def __init__(self) -> None:
        self._clock = RunClock()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._clock.start()

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
