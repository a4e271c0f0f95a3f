"""The curve of the held-out loss: measured before the first step and at least ten times a run, on a few rows.

All held-out rows are measured at the end of each stage, and where the user asks for it. That is too much work for the
points between: in a run of some minutes, ten more such validations would cost a tenth of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

POINTS = 10
"""Points of the curve after the first step."""
SHARE_OF_RUN = 0.01
"""Share of the run's operations that the curve may cost."""
FORWARD_SHARE = 1 / 3
"""Share of the forward pass in the operations of a training step."""


@dataclass
class LossCurve:
    """What the present validation measures.

    Args:
        batches: batches of each source that the curve is measured on; 0: no curve.
        is_brief: whether only these batches are measured.
    """

    batches: int = 0
    is_brief: bool = False

    def begin(self, trainer: Trainer, run_rows: int, sources: int, batch_rows: int) -> None:
        """Chooses the batches of a run, and has the trainer measure them before the first step.

        Args:
            run_rows: rows that the run trains on.
            sources: sets of rows that have a held-out loss each.
            batch_rows: rows of a held-out batch, over all replicas.
        """
        self.batches = batches_within_budget(run_rows, sources, batch_rows)
        if trainer.num_sanity_val_steps == 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            trainer.num_sanity_val_steps = self.batches

    def validation_starts(self, trainer: Trainer, *, measures_all: bool) -> None:
        """Sets what the validation that starts measures.

        Args:
            measures_all: whether all held-out rows are due at this step.
        """
        before_training = trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf")
        self.is_brief = self.batches > 0 and (before_training or not (trainer.sanity_checking or measures_all))


def curve_of(task: LightningModule) -> LossCurve:
    """Returns what the task measures now; a module that is no task of this project has no curve."""
    curve = getattr(task, "curve", None)
    return curve if isinstance(curve, LossCurve) else LossCurve()


def batches_within_budget(run_rows: int, sources: int, batch_rows: int) -> int:
    """Returns the held-out batches of each source that all points of a curve may measure; at least one."""
    rows = SHARE_OF_RUN / FORWARD_SHARE * run_rows / ((POINTS + 1) * max(1, sources))
    return max(1, int(rows // batch_rows))


def next_point(done: int, total: int) -> int:
    """Returns the next step at which the curve has a point: the end of the next tenth of a run."""
    tenth = done * POINTS // total + 1
    return min(total, -(-tenth * total // POINTS))


class HeldOutCurve(Callback):
    """Plans the validations of a run without stages: a few rows at each tenth of the run, and all rows at its end.

    `trainer.val_check_interval` replaces this plan.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if plans_curve(trainer, pl_module):
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            rows = data.total_steps * data.batch_rows
            batch_rows = data.micro_batch_size * trainer.world_size
            curve_of(pl_module).begin(trainer, rows, data.held_out_sets, batch_rows)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._plan(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and plans_curve(trainer, pl_module):
            done = trainer.global_step >= trainer.datamodule.total_steps  # type: ignore[attr-defined]
            curve_of(pl_module).validation_starts(trainer, measures_all=done)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._plan(trainer, pl_module)

    def _plan(self, trainer: Trainer, task: LightningModule) -> None:
        steps = trainer.datamodule.total_steps if plans_curve(trainer, task) else 0  # type: ignore[attr-defined]
        if trainer.global_step < steps:
            trainer.val_check_batch = next_point(trainer.global_step, steps) * trainer.accumulate_grad_batches


def plans_curve(trainer: Trainer, task: LightningModule) -> bool:
    """Returns whether the run has a curve that no callback for stages and no option of the trainer plans."""
    data = getattr(trainer, "datamodule", None)
    return (
        getattr(task, "has_loss_curve", False)
        and hasattr(data, "batch_rows")
        and trainer.val_check_interval == 1.0
        and trainer.enable_validation
    )
