"""Reports what a preference-tuning run is going to do and what it has done."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_danube.callbacks.progress import say
from lightning_danube.callbacks.summaries.run import RunSummary, report_evaluation, reports_fit, write_summary
from lightning_danube.chat.preference_data import PreferenceData
from lightning_danube.chat.preference_summary import (
    PairResults,
    pair_length_line,
    pair_results,
    preference_evaluation_summary,
    preference_fit_summary,
    preference_result_text,
    reference_line,
    results_table,
)
from lightning_danube.chat.summary import model_line, source_lines
from lightning_danube.training.contract import data_of
from lightning_danube.training.position import steps_ahead
from lightning_danube.training.run_facts import run_facts_of
from lightning_danube.training.trackers.loss_curve import curve_of


class PreferenceSummary(RunSummary):
    """Prints the plan and the result of a preference-tuning run and writes `summary.json`.

    Results are measured on each source's held-out pairs. Reward accuracy is the share of pairs whose chosen answer has
    gained more log-probability than the rejected answer. The margin is the mean difference of their rewards. Ranking
    accuracy is the share of pairs whose chosen answer is the likelier answer. Shares have a 95 % interval (Wilson
    1927).

    The results before training need the trainer's check of validation: `num_sanity_val_steps: -1`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._before: PairResults = {}
        self._measured: tuple[int, PairResults] = (-1, {})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # The run's time includes the reference, which the task computes before `on_fit_start`.
        self._clock.start()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = preference_data_of(trainer)
        lines = [model_line(pl_module), *source_lines(data.reports(), "pairs"), reference_line(data.reference)]
        lines.append(pair_length_line(data, steps_ahead(trainer, data.total_steps), str(trainer.log_dir)))
        say(trainer, "\n".join(lines))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if curve_of(pl_module).is_brief:
            return
        if trainer.sanity_checking and trainer.global_step == 0:
            self._before = pair_results(trainer.callback_metrics)
        elif trainer.state.fn == "fit":
            self._measured = trainer.global_step, pair_results(trainer.callback_metrics)
        elif trainer.state.fn == "validate":
            self._report_evaluation(trainer, pl_module)

    def _report_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if reports_fit(trainer):
            data, facts = preference_data_of(trainer), run_facts_of(pl_module)
            # A run that stops within an epoch is not validated at its end: older results are not the result of the run.
            step, measured = self._measured
            after = measured if step == trainer.global_step else {}
            trained = self._trained(trainer)
            summary = preference_fit_summary(pl_module, facts, data, trained, before=self._before, after=after)
            say(trainer, preference_result_text(summary, self._before, after, write_summary(trainer, summary)))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report_evaluation(trainer, pl_module)

    def _report_evaluation(self, trainer: Trainer, task: LightningModule) -> None:
        results, pairs = pair_results(trainer.callback_metrics), run_facts_of(task).held_out_counts
        weights = str(trainer.ckpt_path)
        summary = preference_evaluation_summary(results, pairs, weights=weights, precision=trainer.precision)
        report_evaluation(trainer, summary, results_table([("", results)], pairs))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._before = state_dict["before"]


def preference_data_of(trainer: Trainer) -> PreferenceData:
    """Returns the run's data module.

    Raises:
        ValueError: the run has other data.
    """
    return data_of(
        trainer, PreferenceData, "PreferenceSummary reports on PreferenceData: remove it, or use that data module"
    )
