"""The curve of the held-out loss: measured before the first step and at least ten times a run, on a few rows.

All held-out rows are measured at the end of each stage, and where the user asks for it. That is too much work for the
points between: in a run of some minutes, ten more such validations would cost a tenth of the time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_danube.checkpoints.schedule import is_trial
from lightning_danube.training.contract import CurveData

POINTS = 10
"""Points of the curve after the first step."""
SHARE_OF_RUN = 0.01
"""Share of the run's operations that the curve may cost."""
FORWARD_SHARE = 1 / 3
"""Share of the forward pass in the operations of a training step."""


@runtime_checkable
class MeasuresBeforeTraining(Protocol):
    """What Lightning's connectors set on a trainer; its class does not declare it."""

    num_sanity_val_steps: int | float


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
        assert isinstance(trainer, MeasuresBeforeTraining)
        if trainer.num_sanity_val_steps == 0 and not is_trial(trainer):
            trainer.num_sanity_val_steps = self.batches

    def validation_starts(self, trainer: Trainer, *, measures_all: bool) -> None:
        """Sets what the validation that starts measures.

        Args:
            measures_all: whether all held-out rows are due at this step.
        """
        assert isinstance(trainer, MeasuresBeforeTraining)
        before_training = trainer.sanity_checking and trainer.num_sanity_val_steps != float("inf")
        self.is_brief = self.batches > 0 and (before_training or not (trainer.sanity_checking or measures_all))


def curve_of(task: LightningModule) -> LossCurve:
    """Returns what the task measures now; a module that is not a task of this project has no curve."""
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
        if (data := planned(trainer, pl_module)) is not None:
            rows = data.total_steps * data.batch_rows
            batch_rows = data.micro_batch_size * trainer.world_size
            curve_of(pl_module).begin(trainer, rows, data.held_out_sets, batch_rows)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._plan(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = planned(trainer, pl_module)
        if trainer.state.fn == "fit" and data is not None:
            done = trainer.global_step >= data.total_steps
            curve_of(pl_module).validation_starts(trainer, measures_all=done)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._plan(trainer, pl_module)

    def _plan(self, trainer: Trainer, task: LightningModule) -> None:
        data = planned(trainer, task)
        steps = 0 if data is None else data.total_steps
        if trainer.global_step < steps:
            trainer.val_check_batch = next_point(trainer.global_step, steps) * trainer.accumulate_grad_batches


def planned(trainer: Trainer, task: LightningModule) -> CurveData | None:
    """Returns the data of a run whose curve is planned here; None if stages or an option of the trainer plan it."""
    data = getattr(trainer, "datamodule", None)
    if not getattr(task, "has_loss_curve", False) or trainer.val_check_interval != 1.0 or not trainer.enable_validation:
        return None
    return data if isinstance(data, CurveData) else None
