"""Announces the stages of a curriculum, and has the model validated at the end of each.

The callback does not switch the data to the next stage: the loader computes the stage from the number of the sample.
Loader processes hold copies of the dataset, so a switch would reach them late or never.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_danube.callbacks.progress import say
from lightning_danube.options import Length, TokensOrShare
from lightning_danube.pretraining.position import (
    all_held_out_rows_are_due,
    begin_loss_curve,
    curriculum_of,
    finished_stage,
    next_validation,
    samples_done,
    stage_line,
)
from lightning_danube.training.position import at_logged_step
from lightning_danube.training.trackers.loss_curve import curve_of


class CurriculumStages(Callback):
    """Announces stages. Plans validation: all held-out rows at each stage's end, a few at each tenth of the run.

    Args:
        validate_every: also measure all held-out rows each time after this many tokens ("100M"), or this share of the
            run ("5 %"), rounded up to optimizer steps.
    """

    def __init__(self, validate_every: Length | None = None) -> None:
        self.validate_every = None if validate_every is None else TokensOrShare.parse(validate_every, "validate_every")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        begin_loss_curve(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            due = all_held_out_rows_are_due(trainer, self._interval(trainer))
            curve_of(pl_module).validation_starts(trainer, measures_all=due)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._plan_validation(trainer)
        _, curriculum = curriculum_of(trainer)
        if samples_done(trainer) < curriculum.total_samples:
            self._announce(trainer, resumed=trainer.global_step > 0)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if at_logged_step(trainer, batch_idx):
            self._log_stage(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._plan_validation(trainer)
        k = finished_stage(trainer)
        if k is not None:
            _, curriculum = curriculum_of(trainer)
            say(trainer, f"stage {k + 1} done: {curriculum.stages[k].name}")
            if k + 1 < len(curriculum.stages):
                self._announce(trainer, resumed=False)

    def _plan_validation(self, trainer: Trainer) -> None:
        """Sets the micro-batch after which the trainer validates next."""
        step = next_validation(trainer, self._interval(trainer))
        if step is not None:
            trainer.val_check_batch = step * trainer.accumulate_grad_batches

    def _interval(self, trainer: Trainer) -> int | None:
        """Returns the optimizer steps of `validate_every`."""
        if self.validate_every is None:
            return None
        data, _ = curriculum_of(trainer)
        return self.validate_every.steps(data.total_tokens, data.batch_tokens)

    def _announce(self, trainer: Trainer, resumed: bool) -> None:
        say(trainer, stage_line(trainer, resumed))
        self._log_stage(trainer)

    def _log_stage(self, trainer: Trainer) -> None:
        """Logs the number of the next sample's stage. Each logged step has one, else TensorBoard would draw a slope."""
        _, curriculum = curriculum_of(trainer)
        number = float(curriculum.stage_index(samples_done(trainer)) + 1)
        for logger in trainer.loggers:
            logger.log_metrics({"mix/stage": number}, step=trainer.global_step)
