"""The plan and the scores of a classifier, as texts, a figure and the content of `summary.json`.

Shapes: N texts, C classes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_danube.checkpoints.runs import closing_lines
from lightning_danube.classification.baselines import majority_probabilities, tfidf_probabilities
from lightning_danube.classification.data import ClassificationData
from lightning_danube.classification.scores import (
    METRICS,
    Estimate,
    accuracy_gain,
    average_precision,
    by_class,
    confusion,
    estimates,
)
from lightning_danube.classification.settings import SPLITS
from lightning_danube.classification.task import Classified, TextClassification
from lightning_danube.files import write_text
from lightning_danube.outside.texts import in_figure
from lightning_danube.terminal import amount, counted, minutes_and_seconds, text_table
from lightning_danube.training.run_facts import RunFacts, Trained, rate, trained_parameters

SHOWN_CLASSES = 20
"""Most rows of a table of classes. A longer table shows the classes at both ends."""
SHOWN_BAD_ROWS = 3


# --- the plan ---------------------------------------------------------------------------------------------------------


def plan_text(task: TextClassification, data: ClassificationData, steps: str, run: str) -> str:
    """Returns the size of the model, the classes, what was left out or cut, and the length of the run."""
    trained, head = trained_parameters(task), task.head.weight.numel()
    lines = [
        f"model: {task.config.parameters:,} parameters; {trained:,} train: {trained - head:,} of the adapter, "
        f"{head:,} of the head",
        class_table(data.class_counts()),
    ]
    if data.other_classes:
        lines.append(f"{amount(data.other_classes, 'text')} of other classes left out")
    for split in SPLITS:
        if cut := data.encoded[split].cut:
            count = len(data.encoded[split])
            lost = "end" if data.keep == "start" else "start"
            lines.append(
                f"{split}: {cut:,} of {counted(count, 'text lost its', 'texts lost their')} {lost}, at "
                f"{data.context_length:,} tokens"
            )
    lines.append(
        f"run: {steps} steps of {amount(data.batch_rows, 'text')} ({data.batch_tokens:,} tokens), "
        f"{amount(data.epochs, 'epoch')}, into {run}"
    )
    return "\n".join(lines)


def class_table(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Returns a table of the texts of each class in each split, the largest classes first."""
    largest_first = sorted(counts, key=lambda label: -counts[label]["train"])
    rows = [[label, *(f"{counts[label][split]:,}" for split in SPLITS)] for label in largest_first]
    totals = [f"{sum(one[split] for one in counts.values()):,}" for split in SPLITS]
    return text_table(["class", *SPLITS], [*_ends(rows), [f"all {len(counts)}", *totals]])


def _ends(rows: list[list[str]]) -> list[list[str]]:
    """Returns the rows of a table; of a table that is too long, only the rows at both ends."""
    if len(rows) <= SHOWN_CLASSES:
        return rows
    half = SHOWN_CLASSES // 2
    between = [f"… {len(rows) - 2 * half} more", *([""] * (len(rows[0]) - 1))]
    return [*rows[:half], between, *rows[-half:]]


def list_rejected(data: ClassificationData, path: Path) -> str:
    """Writes the rows that were left out to a file, and returns how many there are and why."""
    write_text(path, "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in data.rejected))
    causes = ", ".join(f"{count:,} × {cause}" for cause, count in data.causes().items())
    lines = [f"{amount(len(data.rejected), 'row')} left out ({causes}), listed in {path}"]
    return "\n".join([*lines, *(f"  {row.message}" for row in data.rejected[:SHOWN_BAD_ROWS])])


def check_resamples(resamples: int) -> int:
    """Returns the number of resampled sets of texts for the intervals.

    Raises:
        ValueError: there are too few.
    """
    if resamples < 20:
        raise ValueError(f"resamples is {resamples}: the ends of an interval need at least 20")
    return resamples


# --- the scores of a split --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """Predictions of the model and of two baselines, trained on the same texts, for the texts of a split.

    Args:
        resamples: number of resampled sets of texts, for the 95 % intervals.
        loss: the model's loss in nats/text.
    """

    split: str
    labels: Sequence[str]
    weights: str
    model: Classified
    majority_NC: Tensor
    tfidf_NC: Tensor
    loss: float
    resamples: int
    seed: int

    @classmethod
    def of(
        cls, data: ClassificationData, weights: str, split: str, model: Classified, *, loss: float, resamples: int
    ) -> Compared:
        """Trains the baselines, and classifies with them the texts that the model has classified."""
        train = data.encoded["train"].classes.tolist()
        texts = [text.text for text in data.splits["train"]]
        asked = [data.splits[split][row].text for row in model.rows_N.tolist()]
        majority = majority_probabilities(train, len(data.labels), len(asked))
        tfidf = tfidf_probabilities(texts, train, len(data.labels), asked)
        baselines = torch.from_numpy(majority), torch.from_numpy(tfidf)
        return cls(split, data.labels, weights, model, *baselines, loss, resamples, data.seed)

    def scored(self) -> Scored:
        """Computes the scores and their intervals."""
        classes_N, probabilities_NC = self.model.classes_N, self.model.probabilities_NC
        options: Any = {"resamples": self.resamples, "seed": self.seed}
        systems = {"majority": self.majority_NC, "tfidf": self.tfidf_NC, "model": probabilities_NC}
        return Scored(
            self,
            {name: estimates(said_NC, classes_N, **options) for name, said_NC in systems.items()},
            accuracy_gain(probabilities_NC, self.tfidf_NC, classes_N, **options),
            by_class(probabilities_NC, classes_N),
            average_precision(probabilities_NC, classes_N) if len(self.labels) == 2 else None,
            confusion(probabilities_NC, classes_N),
        )


@dataclass(frozen=True)
class Scored:
    """The scores of the model and the baselines on a split.

    Args:
        estimates: "majority", "tfidf" or "model" → metric → score with its interval.
        gain: accuracy of the model minus the accuracy of TF-IDF.
        classes: for each class the number of its texts, precision, recall and F1.
        average_precision: for the second of two classes; None for more classes.
        confusion_CC: counts; row: true class; column: predicted class.
    """

    compared: Compared
    estimates: Mapping[str, Mapping[str, Estimate]]
    gain: Estimate
    classes: Sequence[Mapping[str, Any]]
    average_precision: float | None
    confusion_CC: Tensor

    def text(self) -> str:
        """Returns the tables of the scores, and how to read them."""
        titles = {
            "majority": "majority class",
            "tfidf": "TF-IDF + logistic regression",
            "model": f"LoRA on {self.compared.weights}",
        }
        rows = [
            [title, *(f"{self.estimates[name][metric]:.3f}" for metric in METRICS)] for name, title in titles.items()
        ]
        texts = len(self.compared.model.classes_N)
        header = [f"{self.compared.split}, {amount(texts, 'text')}", *(metric.title for metric in METRICS.values())]
        lines = ["", text_table(header, rows), "", f"accuracy above TF-IDF's: {_signed(self.gain)}"]
        if self.average_precision is not None:
            lines.append(f"average precision for {self.compared.labels[1]!r}: {self.average_precision:.3f}")
        lines += [
            "in brackets: 95 % intervals, by resampling the texts; they do not cover another training run",
            "noise alone raises a calibration error: its interval is lowered by as much, and may lie below it",
            "",
            detail_table(self.compared.labels, self.classes),
            "",
        ]
        return "\n".join(lines)

    def summary(self) -> dict[str, Any]:
        """Returns what `summary.json` holds about the split."""
        extra = {} if self.average_precision is None else {"average_precision": self.average_precision}
        return {
            "n": len(self.compared.model.classes_N),
            **flat(self.estimates["model"]),
            **extra,
            "loss": self.compared.loss,
            "baselines": {name: flat(self.estimates[name]) for name in ("majority", "tfidf")},
            "accuracy_above_tfidf": self.gain.value,
            "accuracy_above_tfidf_interval": [self.gain.low, self.gain.high],
            "classes": [{"label": label, **row} for label, row in zip(self.compared.labels, self.classes, strict=True)],
            "confusion": self.confusion_CC.tolist(),
            "resamples": self.compared.resamples,
        }


def flat(found: Mapping[str, Estimate]) -> dict[str, Any]:
    """Returns the scores and their intervals as flat values: accuracy, accuracy_interval, and so on."""
    values: dict[str, Any] = {}
    for name, estimate in found.items():
        facts = asdict(estimate)
        values |= {name: facts["value"], f"{name}_interval": [facts["low"], facts["high"]]}
    return values


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def detail_table(labels: Sequence[str], details: Sequence[Mapping[str, Any]]) -> str:
    """Returns a table of the precision, recall and F1 of each class, the worst F1 last."""
    order = sorted(range(len(labels)), key=lambda number: -details[number]["f1"])
    rows = [
        [labels[c], f"{details[c]['n']:,}", *(f"{details[c][name]:.3f}" for name in ("precision", "recall", "f1"))]
        for c in order
    ]
    return text_table(["class", "texts", "precision", "recall", "F1"], _ends(rows))


def confusion_figure(matrix_CC: Tensor, labels: Sequence[str]) -> Any:
    """Returns a figure of the counts, with numbers in the cells if there are few enough classes to read them."""
    # Not pyplot's Figure: pyplot would keep the figure, and ask for a screen if there is one.
    from matplotlib.figure import Figure
    from torchmetrics.utilities.plot import plot_confusion_matrix

    side = max(4.0, 0.5 * len(labels))
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    plot_confusion_matrix(
        matrix_CC,
        ax=axes,
        add_text=len(labels) <= SHOWN_CLASSES,
        labels=[in_figure(label) for label in labels],
        cmap="Blues",
    )
    return figure


# --- the result of `fit` ----------------------------------------------------------------------------------------------


def classification_fit_summary(
    task: TextClassification, facts: RunFacts, data: ClassificationData, trained: Trained
) -> dict[str, Any]:
    """Returns the content of `summary.json` of `fit`, without the scores."""
    return {
        "weights": task.weights,
        "steps": trained.steps,
        "parameters": task.config.parameters,
        "trained_parameters": trained_parameters(task),
        "precision": trained.precision,
        "seconds": round(trained.seconds, 3),
        "texts_per_second": rate(trained.steps * data.batch_rows, facts.training_seconds, digits=2),
        "classes": data.class_counts(),
        "left_out": data.causes(),
    }


def classification_result_text(summary: Mapping[str, Any], run: Path) -> str:
    """Returns how long the run took, and the command that tests its classifier."""
    done = f"{amount(summary['steps'], 'step')} in {minutes_and_seconds(summary['seconds'])}"
    return "\n".join(closing_lines(done, run, "test", "--config", run / "config.yaml", "--ckpt_path", run))
