"""Skips optimizer steps whose loss or gradient is not finite, or whose loss spikes, and stops when they persist."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_danube.callbacks.progress import say
from lightning_danube.pretraining.position import samples_of_step
from lightning_danube.training.bad_steps import (
    BadSteps,
    append_record,
    drop_later_records,
    too_many_bad_steps,
)
from lightning_danube.training.position import at_logged_step, run_directory
from lightning_danube.training.run_facts import run_facts_of
from lightning_danube.training.task import DecoderTask


class SkipBadSteps(Callback):
    """Skips bad optimizer steps, on all ranks alike, and records their samples in the run's `skipped.jsonl`.

    A skipped step leaves weights and optimizer state bitwise as they were. It still counts as a step, so the place in
    the data stays steps × batch: the samples of a skipped step are passed over.

    Args:
        stop_after: stop the run after this many skipped steps in a row.
        spike_deviations: also skip a step whose loss is this many standard deviations above the mean of the last
            `spike_window` losses that counted. Off by default.
        spike_window: losses of that mean and deviation. No loss is a spike before the window is full.

    Logs `optimizer/skipped_steps`, counted over the whole run.
    """

    def __init__(self, stop_after: int = 5, spike_deviations: float | None = None, spike_window: int = 128) -> None:
        self._steps = BadSteps(spike_deviations, spike_window, stop_after)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps.move_to(trainer.strategy.root_device)
        assert isinstance(pl_module, DecoderTask)
        pl_module.step_verdict = self._steps.verdict
        run_facts_of(pl_module).skipped_steps = lambda: self._read(trainer)
        if trainer.is_global_zero:
            drop_later_records(run_directory(trainer) / "skipped.jsonl", trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (late := self._steps.take(trainer.global_step)) is not None:
            self._read(trainer, late)
        if at_logged_step(trainer, batch_idx):
            for logger in trainer.loggers:
                logger.log_metrics({"optimizer/skipped_steps": float(self._steps.skipped)}, step=trainer.global_step)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._read(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read(trainer)

    def _read(self, trainer: Trainer, all_but: int = 0) -> int:
        """Records the steps that were decided so far, except the newest `all_but`; returns the number skipped so far.

        Raises:
            TrainingStopped: too many steps in a row were skipped.
        """
        for bad in self._steps.read(all_but):
            say(trainer, str(bad))
            run = run_directory(trainer) if trainer.is_global_zero else None
            if run is not None:
                append_record(run / "skipped.jsonl", bad, samples_of_step(trainer, bad.step))
            if self._steps.in_a_row >= self._steps.stop_after:
                self._steps.forget_unread()
                raise too_many_bad_steps(self._steps.in_a_row, bad.step, run)
        return self._steps.skipped

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._read(trainer)
        checkpoint["skipped_steps"] = self._steps.state()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit" and "skipped_steps" in checkpoint:
            self._steps.restore(checkpoint["skipped_steps"])
