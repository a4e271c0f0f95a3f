"""What a classifier was trained on and how good it is: scores with intervals beside two baselines, and summary.json."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_danube.callbacks.progress import can_draw, say
from lightning_danube.callbacks.throughput import Throughput
from lightning_danube.classification.baselines import majority_probabilities, tfidf_probabilities
from lightning_danube.classification.data import SPLITS, ClassificationData
from lightning_danube.classification.scores import (
    METRICS,
    accuracy_gain,
    average_precision,
    by_class,
    confusion,
    estimates,
)
from lightning_danube.classification.task import Classified, TextClassification
from lightning_danube.files import write_json, write_text
from lightning_danube.intervals import Estimate
from lightning_danube.terminal import quoted, runnable, text_table
from lightning_danube.training.position import is_done, run_directory, steps_ahead

SHOWN_CLASSES = 20
"""Rows of a table of classes; of more, those at both ends are shown."""
SHOWN_BAD_ROWS = 3


class ClassificationSummary(Callback):
    """Prints the plan of a run and the scores of each split that is evaluated, and writes `summary.json`.

    Beside the model stand the majority class and TF-IDF with logistic regression, trained on the same texts, since a
    user should know when a language model is not needed. TensorBoard gets the confusion matrix as a picture and, of two
    classes, the precision-recall curve.

    Args:
        resamples: of the texts, for the 95 % intervals.
    """

    def __init__(self, resamples: int = 1000) -> None:
        if resamples < 20:
            raise ValueError(f"resamples is {resamples}: the ends of an interval need at least 20")
        self.resamples = resamples
        self._seconds_before = 0.0
        self._began = time.monotonic()
        self._first_step = 0

    # --- fit ----------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.monotonic()
        data, task = classification_of(trainer)
        trained = sum(parameter.numel() for parameter in task.parameters() if parameter.requires_grad)
        head = task.head.weight.numel()
        lines = [
            f"model: {task.config.parameters:,} parameters; {trained:,} train: {trained - head:,} of the adapter, "
            f"{head:,} of the head",
            class_table(data.class_counts()),
        ]
        if data.other_classes:
            lines.append(f"{data.other_classes:,} texts of other classes left out")
        for split in SPLITS:
            if cut := data.encoded[split].cut:
                count = len(data.encoded[split])
                lines.append(f"{split}: {cut:,} of {count:,} texts lost their end, at {data.context_length:,} tokens")
        lines.append(
            f"run: {steps_ahead(trainer, data.total_steps)} steps of {data.batch_texts} texts "
            f"({data.batch_tokens:,} tokens), {data.epochs} pass(es), "
            f"into {trainer.log_dir}"  # a broadcast, so on every rank
        )
        say(trainer, "\n".join(lines))
        report_rejected(trainer, data)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, task = classification_of(trainer)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        directory = run_directory(trainer)
        if trainer.global_step == self._first_step:
            # Its summary stays: without a validation this one would say less.
            say(trainer, f"{directory} is complete: {trainer.global_step:,} steps; nothing is left to do")
            return
        throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), None)  # type: ignore[attr-defined]
        in_training = throughput.seconds if throughput else 0.0
        seconds = self._seconds()
        texts = trainer.global_step * data.batch_texts
        summary = {
            "weights": task.weights,
            "steps": trainer.global_step,
            "parameters": task.config.parameters,
            "trained_parameters": sum(p.numel() for p in task.parameters() if p.requires_grad),
            "precision": trainer.precision,
            "seconds": round(seconds, 3),
            "texts_per_second": round(texts / in_training, 2) if in_training else None,
            "classes": data.class_counts(),
            "left_out": data.causes(),
        }
        if task.latest is not None and is_done(trainer):
            summary["validation"] = self._report(trainer, "validation", task.latest)
        write_json(directory / "summary.json", summary)
        minutes, rest = divmod(round(seconds), 60)
        say(
            trainer,
            f"{trainer.global_step:,} steps in {minutes} min {rest:02d} s\n"
            f"run:  {directory}\n"
            f"next: {runnable()} test --config {quoted(directory / 'config.yaml')} "
            f"--ckpt_path {quoted(directory)}",
        )

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._began

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._seconds_before = state_dict["seconds"]

    # --- validate, test and predict -----------------------------------------------------------------------------------

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._report_evaluation(trainer, "validation")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._report_evaluation(trainer, "test")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        report_rejected(trainer, classification_of(trainer)[0])

    def _report_evaluation(self, trainer: Trainer, split: str) -> None:
        data, task = classification_of(trainer)
        if not trainer.is_global_zero:
            return
        assert task.latest is not None
        report_rejected(trainer, data)
        result = self._report(trainer, split, task.latest)
        path = run_directory(trainer) / "summary.json"
        facts = {"weights": str(trainer.ckpt_path), "precision": trainer.precision, "left_out": data.causes()}
        write_json(path, {**facts, split: result})
        say(trainer, f"written to {path}")

    def _report(self, trainer: Trainer, split: str, model: Classified) -> dict[str, Any]:
        """Prints the scores of a split, draws them, and returns what belongs into summary.json."""
        data, task = classification_of(trainer)
        classes_N = model.classes_N
        systems = {
            "majority": ("majority class", self._majority(data, split)),
            "tfidf": ("TF-IDF + logistic regression", self._tfidf(data, split)),
            "model": (f"LoRA on {task.weights}", model.probabilities_NC),
        }
        options: Any = {"resamples": self.resamples, "seed": data.seed}
        found = {name: estimates(said, classes_N, **options) for name, (_, said) in systems.items()}
        gain = accuracy_gain(model.probabilities_NC, systems["tfidf"][1], classes_N, **options)
        rows = [[title, *(f"{found[name][metric]:.3f}" for metric in METRICS)] for name, (title, _) in systems.items()]
        header = [f"{split}, {len(classes_N):,} texts", *(metric.title for metric in METRICS.values())]
        lines = ["", text_table(header, rows), "", f"accuracy above TF-IDF's: {gain:+.3f}"]
        details = by_class(model.probabilities_NC, classes_N)
        extra: dict[str, Any] = {}
        if len(data.labels) == 2:
            extra["average_precision"] = average_precision(model.probabilities_NC, classes_N)
            lines.append(f"average precision for {data.labels[1]!r}: {extra['average_precision']:.3f}")
        lines += [
            "in brackets: 95 % intervals, by resampling the texts; they do not cover another training run",
            "noise alone raises a calibration error: its interval is lowered by as much, and may lie below it",
            "",
            detail_table(data.labels, details),
            "",
        ]
        say(trainer, "\n".join(lines))
        matrix_CC = confusion(model.probabilities_NC, classes_N)
        draw(trainer, split, model, matrix_CC, data.labels)
        return {
            "n": len(classes_N),
            **flat(found["model"]),
            **extra,
            "loss": float(trainer.callback_metrics[f"loss/{split}"]),
            "baselines": {name: flat(found[name]) for name in ("majority", "tfidf")},
            "accuracy_above_tfidf": gain.value,
            "accuracy_above_tfidf_interval": [gain.low, gain.high],
            "classes": [{"label": label, **row} for label, row in zip(data.labels, details, strict=True)],
            "confusion": matrix_CC.tolist(),
            "resamples": self.resamples,
        }

    @staticmethod
    def _majority(data: ClassificationData, split: str) -> Tensor:
        train = data.encoded["train"].classes.tolist()
        return torch.from_numpy(majority_probabilities(train, len(data.labels), len(data.splits[split])))

    @staticmethod
    def _tfidf(data: ClassificationData, split: str) -> Tensor:
        train = data.encoded["train"].classes.tolist()
        texts, asked = ([text.text for text in data.splits[name]] for name in ("train", split))
        return torch.from_numpy(tfidf_probabilities(texts, train, len(data.labels), asked))


def flat(found: Mapping[str, Estimate]) -> dict[str, Any]:
    """accuracy, accuracy_interval, and so on."""
    values: dict[str, Any] = {}
    for name, estimate in found.items():
        values |= {name: estimate.value, f"{name}_interval": [estimate.low, estimate.high]}
    return values


def class_table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Texts of each class in each split, the largest classes first."""
    largest_first = sorted(counts, key=lambda label: -counts[label]["train"])
    rows = [[label, *(f"{counts[label][split]:,}" for split in SPLITS)] for label in largest_first]
    totals = [f"{sum(one[split] for one in counts.values()):,}" for split in SPLITS]
    return text_table(["class", *SPLITS], [*_ends(rows), [f"all {len(counts)}", *totals]])


def detail_table(labels: Sequence[str], details: Sequence[Mapping[str, Any]]) -> str:
    """Precision, recall and F1 of each class, the worst F1 last."""
    order = sorted(range(len(labels)), key=lambda number: -details[number]["f1"])
    rows = [
        [labels[c], f"{details[c]['n']:,}", *(f"{details[c][name]:.3f}" for name in ("precision", "recall", "f1"))]
        for c in order
    ]
    return text_table(["class", "texts", "precision", "recall", "F1"], _ends(rows))


def _ends(rows: list[list[str]]) -> list[list[str]]:
    if len(rows) <= SHOWN_CLASSES:
        return rows
    half = SHOWN_CLASSES // 2
    between = [f"… {len(rows) - 2 * half} more", *([""] * (len(rows[0]) - 1))]
    return [*rows[:half], between, *rows[-half:]]


def draw(trainer: Trainer, split: str, model: Classified, matrix_CC: Tensor, labels: Sequence[str]) -> None:
    """The confusion matrix, and of two classes the precision-recall curve, for TensorBoard."""
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger):
            continue
        step = trainer.global_step
        if can_draw(trainer):
            logger.experiment.add_figure(f"confusion/{split}", confusion_figure(matrix_CC, labels), step)
        if len(labels) == 2:
            logger.experiment.add_pr_curve(
                f"precision_recall/{split}/{labels[1]}", model.classes_N, model.probabilities_NC[:, 1], step
            )


def confusion_figure(matrix_CC: Tensor, labels: Sequence[str]) -> Any:
    """A picture of the counts; numbers in the cells as long as they can be read."""
    # Not pyplot's: that would keep the figure, and ask for a screen where there is one.
    from matplotlib.figure import Figure
    from torchmetrics.utilities.plot import plot_confusion_matrix

    side = max(4.0, 0.5 * len(labels))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    plot_confusion_matrix(matrix_CC, ax=axes, add_text=len(labels) <= SHOWN_CLASSES, labels=list(labels), cmap="Blues")
    return figure


def report_rejected(trainer: Trainer, data: ClassificationData) -> None:
    """Says how many rows were left out and why, and lists all of them in the run's directory."""
    if not data.rejected or not trainer.is_global_zero:
        return
    path: Path = run_directory(trainer) / "rejected.jsonl"
    rows = [json.dumps(row._asdict(), ensure_ascii=False) for row in data.rejected]
    write_text(path, "\n".join(rows) + "\n")
    causes = ", ".join(f"{count:,} × {cause}" for cause, count in data.causes().items())
    lines = [f"{len(data.rejected):,} rows left out ({causes}), listed in {path}"]
    lines += [f"  {row.message}" for row in data.rejected[:SHOWN_BAD_ROWS]]
    say(trainer, "\n".join(lines))


def classification_of(trainer: Trainer) -> tuple[ClassificationData, TextClassification]:
    """
    Raises:
        ValueError: the run is of another task.
    """
    data, task = trainer.datamodule, trainer.lightning_module  # type: ignore[attr-defined]
    if not isinstance(data, ClassificationData) or not isinstance(task, TextClassification):
        raise ValueError(
            "ClassificationSummary reports on TextClassification with ClassificationData: remove it, or use both"
        )
    return data, task
