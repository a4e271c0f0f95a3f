"""Reports what a pre-training run is going to do and what it has done."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_danube.callbacks.progress import say
from lightning_danube.callbacks.summaries.run import RunSummary, report_evaluation, reports_fit, write_summary
from lightning_danube.checkpoints.strategy import wait_for_checkpoint
from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.pretraining.position import curriculum_of, finished_stage
from lightning_danube.pretraining.summary import (
    HeldOutText,
    Losses,
    early_stop_text,
    evaluation_summary,
    evaluation_table,
    fit_summary,
    pretraining_plan_text,
    result_text,
    with_stage_losses,
)
from lightning_danube.terminal import markdown_code
from lightning_danube.training.contract import data_of
from lightning_danube.training.position import place_in_tensorboard, tensorboards
from lightning_danube.training.run_facts import metrics_of_sources, run_facts_of


class PretrainingSummary(RunSummary):
    """Prints the plan and the result of a run and writes `summary.json` after every stage.

    `fit_summary` and `evaluation_summary` in pretraining/summary.py say what the file holds. The callback TokenLedger
    has to count the tokens. Losses before training need the trainer's `num_sanity_val_steps: -1`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stage_losses: list[Losses] = []
        self._before: Losses = {}
        self._unigram: dict[str, float] = {}
        self._held_out = HeldOutText({}, {})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        data, _ = curriculum_of(trainer)
        self._unigram, self._held_out = data.unigram_losses(), HeldOutText.of(data, data.validation_rows)
        decoder: Any = pl_module.decoder
        plan = pretraining_plan_text(trainer, decoder)
        say(trainer, plan)
        for tensorboard in tensorboards(trainer):
            tensorboard.add_text("run/plan", markdown_code(plan), place_in_tensorboard(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            _evaluated(trainer, pl_module, pretraining_data_of(trainer).validation_rows)
        if trainer.state.fn != "fit":
            return
        measured = metrics_of_sources(trainer.callback_metrics)
        if trainer.sanity_checking and trainer.global_step == 0:
            self._before = measured
        if trainer.sanity_checking or (stage := finished_stage(trainer)) is None:
            return
        self._stage_losses = with_stage_losses(self._stage_losses, stage, measured)
        summary = self._summary(trainer, pl_module)
        if reports_fit(trainer):
            write_summary(trainer, summary)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        summary = self._summary(trainer, pl_module)
        if not reports_fit(trainer):
            return
        run, (_, curriculum) = write_summary(trainer, summary), curriculum_of(trainer)
        wait_for_checkpoint(trainer.strategy)  # both texts say whether there is one
        if trainer.global_step < curriculum.total_steps:
            say(trainer, early_stop_text(summary, curriculum.total_steps, run))
        if self._stage_losses:
            samples, drawn = run_facts_of(pl_module).samples, bool(tensorboards(trainer))
            say(trainer, result_text(summary, curriculum.sources, run, samples, in_tensorboard=drawn))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _evaluated(trainer, pl_module, None)

    def _summary(self, trainer: Trainer, task: LightningModule) -> dict[str, Any]:
        facts, (data, curriculum) = run_facts_of(task), curriculum_of(trainer)
        measured = (self._stage_losses, self._held_out.counted(facts), self._unigram, self._trained(trainer))
        return fit_summary(task, facts, curriculum, *measured, before=self._before, counted=data.counted_tokens())

    def state_dict(self) -> dict[str, Any]:
        return {"stage_losses": self._stage_losses, "before": self._before, **super().state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._stage_losses, self._before = state_dict["stage_losses"], state_dict.get("before", {})


def pretraining_data_of(trainer: Trainer) -> CurriculumData:
    """Returns the run's data module. Outside `fit` its curriculum is not known.

    Raises:
        ValueError: the run has other data.
    """
    return data_of(
        trainer, CurriculumData, "PretrainingSummary reports on CurriculumData: remove it, or use that data module"
    )


def _evaluated(trainer: Trainer, task: LightningModule, rows: int | None) -> None:
    """Reports the result of `validate` or `test` on at most `rows` held-out rows of a source."""
    losses = metrics_of_sources(trainer.callback_metrics)
    held_out = HeldOutText.of(pretraining_data_of(trainer), rows).counted(run_facts_of(task))
    weights = str(trainer.ckpt_path or getattr(task, "weights", None))
    summary = evaluation_summary(losses, held_out, weights=weights, precision=trainer.precision)
    report_evaluation(trainer, summary, evaluation_table(losses, held_out))
