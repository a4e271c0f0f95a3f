"""Reports what a classifier is trained on and how good it is."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lightning_danube.callbacks.progress import can_draw, say
from lightning_danube.callbacks.summaries.run import RunSummary, reports_fit, write_summary
from lightning_danube.classification.data import ClassificationData
from lightning_danube.classification.summary import (
    Compared,
    Scored,
    check_resamples,
    classification_fit_summary,
    classification_result_text,
    confusion_figure,
    list_rejected,
    plan_text,
)
from lightning_danube.classification.task import TextClassification
from lightning_danube.training.contract import data_of
from lightning_danube.training.position import is_done, place_in_tensorboard, run_directory, steps_ahead, tensorboards


class ClassificationSummary(RunSummary):
    """Prints the plan of a run and the scores of each split that is evaluated, and writes `summary.json`.

    Two baselines are scored on the same texts: the majority class, and TF-IDF with logistic regression, trained on
    the training texts. They show whether a language model is needed. TensorBoard gets the confusion matrix as a
    figure and, for two classes, the precision-recall curve.

    Args:
        resamples: resampled sets of texts, for the 95 % intervals.
    """

    def __init__(self, resamples: int = 1000) -> None:
        super().__init__()
        self.resamples = check_resamples(resamples)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        data, task = classification_of(trainer)
        # `log_dir` is a broadcast, so every rank asks.
        say(trainer, plan_text(task, data, steps_ahead(trainer, data.total_steps), str(trainer.log_dir)))
        report_rejected(trainer)

    def _report_fit(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, task = classification_of(trainer)
        if not reports_fit(trainer):
            return
        summary = classification_fit_summary(task, task.run_facts, data, self._trained(trainer))
        if task.latest is not None and is_done(trainer):
            summary["validation"] = self._report(trainer, "validation")
        say(trainer, classification_result_text(summary, write_summary(trainer, summary)))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._report_evaluation(trainer, "validation")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report_evaluation(trainer, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        report_rejected(trainer)

    def _report_evaluation(self, trainer: Trainer, split: str) -> None:
        if trainer.is_global_zero:
            report_rejected(trainer)
            facts = {"weights": str(trainer.ckpt_path), "precision": trainer.precision}
            left_out = classification_of(trainer)[0].causes()
            summary = {**facts, "left_out": left_out, split: self._report(trainer, split)}
            say(trainer, f"written to {write_summary(trainer, summary) / 'summary.json'}")

    def _report(self, trainer: Trainer, split: str) -> dict[str, Any]:
        """Prints and draws the scores of a split, and returns what `summary.json` holds about them."""
        data, task = classification_of(trainer)
        assert task.latest is not None and task.weights is not None
        loss = float(trainer.callback_metrics[f"loss/{split}"])
        scored = Compared.of(data, task.weights, split, task.latest, loss=loss, resamples=self.resamples).scored()
        say(trainer, scored.text())
        draw(trainer, scored)
        return scored.summary()


def report_rejected(trainer: Trainer) -> None:
    """Lists the rows that were left out in a file, and says so."""
    data, _ = classification_of(trainer)
    if data.rejected and trainer.is_global_zero:
        say(trainer, list_rejected(data, run_directory(trainer) / "rejected.jsonl"))


def draw(trainer: Trainer, scored: Scored) -> None:
    """Draws the confusion matrix and, for two classes, the precision-recall curve in TensorBoard."""
    split, labels, model = scored.compared.split, scored.compared.labels, scored.compared.model
    for tensorboard in tensorboards(trainer):
        step = place_in_tensorboard(trainer)
        if can_draw(trainer):
            tensorboard.add_figure(f"confusion/{split}", confusion_figure(scored.confusion_CC, labels), step)
        if len(labels) == 2:
            tensorboard.add_pr_curve(
                f"precision_recall/{split}/{labels[1]}", model.classes_N, model.probabilities_NC[:, 1], step
            )


def classification_of(trainer: Trainer) -> tuple[ClassificationData, TextClassification]:
    """Returns the run's data module and task.

    Raises:
        ValueError: the run is of another task.
    """
    problem = "ClassificationSummary reports on TextClassification with ClassificationData: remove it, or use both"
    data, task = data_of(trainer, ClassificationData, problem), trainer.lightning_module
    if not isinstance(task, TextClassification):
        raise ValueError(problem)
    return data, task
