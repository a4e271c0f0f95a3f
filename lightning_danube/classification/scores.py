"""Scores of a classifier by torchmetrics, with intervals by resampling the texts.

Shapes: N texts, C classes. An interval covers the variation between test sets of this size from the same distribution,
not the variation between training runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics.functional.classification import (
    binary_average_precision,
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
    multiclass_f1_score,
    multiclass_precision,
    multiclass_recall,
)

from lightning_danube.intervals import Estimate, bootstrap

BINS = 15


@dataclass(frozen=True)
class Metric:
    """A score of (probabilities_NC, classes_N), and the method of scipy.stats.bootstrap for its interval.

    Resampled texts have a larger calibration error than the texts themselves, because the noise of each bin counts as
    an error. The method "basic" reverses this bias; "percentile" would double it.
    """

    title: str
    score: Callable[[Tensor, Tensor], Tensor]
    method: Literal["percentile", "basic"] = "percentile"

    def __call__(self, probabilities_NC: Tensor, classes_N: Tensor) -> float:
        return float(self.score(probabilities_NC, classes_N))


def _accuracy(probabilities_NC: Tensor, classes_N: Tensor) -> Tensor:
    C = probabilities_NC.shape[1]
    return multiclass_accuracy(probabilities_NC, classes_N, C, average="micro", validate_args=False)


def _macro_f1(probabilities_NC: Tensor, classes_N: Tensor) -> Tensor:
    C = probabilities_NC.shape[1]
    return multiclass_f1_score(probabilities_NC, classes_N, C, average="macro", validate_args=False)


def _calibration_error(probabilities_NC: Tensor, classes_N: Tensor) -> Tensor:
    C = probabilities_NC.shape[1]
    return multiclass_calibration_error(probabilities_NC, classes_N, C, n_bins=BINS, norm="l1", validate_args=False)


METRICS = {
    "accuracy": Metric("accuracy", _accuracy),
    "macro_f1": Metric("macro F1", _macro_f1),
    "calibration_error": Metric("calibration error", _calibration_error, method="basic"),
}


def scores(probabilities_NC: Tensor, classes_N: Tensor) -> dict[str, float]:
    """Returns name → score."""
    return {name: metric(probabilities_NC, classes_N) for name, metric in METRICS.items()}


def estimates(probabilities_NC: Tensor, classes_N: Tensor, *, resamples: int, seed: int) -> dict[str, Estimate]:
    """Returns name → score with its interval."""
    found = {}
    for name, metric in METRICS.items():

        def score(texts: NDArray[np.int64], metric: Metric = metric) -> float:
            chosen = torch.from_numpy(texts)
            return metric(probabilities_NC[chosen], classes_N[chosen])

        texts_N = np.arange(len(classes_N))
        # The basic interval is reflected at the score and may leave the score's range, so it needs limits.
        found[name] = bootstrap(texts_N, score, resamples=resamples, method=metric.method, seed=seed, limits=(0.0, 1.0))
    return found


def accuracy_gain(
    probabilities_NC: Tensor, baseline_NC: Tensor, classes_N: Tensor, *, resamples: int, seed: int
) -> Estimate:
    """Returns the model's accuracy minus the baseline's on the same texts, with its interval.

    The comparison is paired, so texts that are hard for both classifiers cancel.
    """
    gains = (probabilities_NC.argmax(1) == classes_N).double() - (baseline_NC.argmax(1) == classes_N).double()
    values = gains.numpy()
    texts_N = np.arange(len(values))
    return bootstrap(
        texts_N, lambda texts: float(values[texts].mean()), resamples=resamples, seed=seed, limits=(-1.0, 1.0)
    )


def by_class(probabilities_NC: Tensor, classes_N: Tensor) -> list[dict[str, Any]]:
    """Returns for each class the number of its texts, and the precision, recall and F1 of the predictions."""
    C = probabilities_NC.shape[1]
    options: Any = {"num_classes": C, "average": "none", "validate_args": False}
    columns = {
        "n": torch.bincount(classes_N, minlength=C),
        "precision": multiclass_precision(probabilities_NC, classes_N, **options),
        "recall": multiclass_recall(probabilities_NC, classes_N, **options),
        "f1": multiclass_f1_score(probabilities_NC, classes_N, **options),
    }
    return [{name: values[c].item() for name, values in columns.items()} for c in range(C)]


def confusion(probabilities_NC: Tensor, classes_N: Tensor) -> Tensor:
    """Returns counts (C, C); row: true class; column: predicted class."""
    return multiclass_confusion_matrix(probabilities_NC, classes_N, probabilities_NC.shape[1], validate_args=False)


def average_precision(probabilities_N2: Tensor, classes_N: Tensor) -> float:
    """Returns the area under the precision-recall curve of the second of two classes."""
    return float(binary_average_precision(probabilities_N2[:, 1], classes_N))
