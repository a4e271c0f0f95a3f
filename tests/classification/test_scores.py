"""Scores against scikit-learn and a calibration error written out; intervals against what they must cover."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score, precision_recall_fscore_support
from torch import Tensor

from lightning_danube.classification.scores import (
    accuracy_gain,
    average_precision,
    by_class,
    confusion,
    estimates,
    scores,
)


def answers(texts: int = 300, classes: int = 4, seed: int = 0, sharpness: float = 1.5) -> tuple[Tensor, Tensor]:
    """Calibrated by construction at sharpness 1: labels are drawn from the probabilities."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(texts, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return (sharpness * logits).softmax(1), labels


def calibration_error(probabilities: Tensor, classes: Tensor, bins: int = 15) -> float:
    """Guo et al. 2017, equation 5."""
    confidence, predicted = probabilities.max(1)
    error = 0.0
    for bin_ in range(bins):
        inside = (confidence > bin_ / bins) & (confidence <= (bin_ + 1) / bins)
        if inside.any():
            right = (predicted[inside] == classes[inside]).double().mean()
            error += float(inside.double().mean() * (right - confidence[inside].mean()).abs())
    return error


def test_scores_are_those_of_other_implementations() -> None:
    probabilities, classes = answers()
    predicted = probabilities.argmax(1)
    found = scores(probabilities, classes)
    # torchmetrics counts in float32.
    assert found["accuracy"] == pytest.approx(float((predicted == classes).double().mean()), abs=1e-6)
    assert found["macro_f1"] == pytest.approx(f1_score(classes, predicted, average="macro"), abs=1e-6)
    assert found["calibration_error"] == pytest.approx(calibration_error(probabilities, classes), abs=1e-6)
    assert confusion(probabilities, classes).tolist() == confusion_matrix(classes, predicted).tolist()
    theirs = precision_recall_fscore_support(classes, predicted)
    for number, row in enumerate(by_class(probabilities, classes)):
        found_row = [row[name] for name in ("precision", "recall", "f1", "n")]
        assert found_row == pytest.approx([column[number] for column in theirs], abs=1e-6)


def test_average_precision_of_the_second_of_two_classes() -> None:
    probabilities, classes = answers(classes=2)
    expected = average_precision_score(classes, probabilities[:, 1])
    assert average_precision(probabilities, classes) == pytest.approx(expected, abs=1e-6)


def test_a_class_that_nobody_has_or_predicts_does_not_count() -> None:
    probabilities, classes = answers(classes=3)
    wider = torch.cat([probabilities, torch.zeros(len(classes), 1)], 1)
    assert scores(wider, classes)["macro_f1"] == pytest.approx(scores(probabilities, classes)["macro_f1"], abs=1e-6)


def test_the_interval_of_an_accuracy_is_the_binomial_one() -> None:
    probabilities, classes = answers(texts=400)
    found = estimates(probabilities, classes, resamples=1000, seed=1)["accuracy"]
    spread = 1.96 * np.sqrt(found.value * (1 - found.value) / 400)
    # 1,000 resamples place each end within about 0.1 of half the width.
    assert found.low == pytest.approx(found.value - spread, abs=0.2 * spread)
    assert found.high == pytest.approx(found.value + spread, abs=0.2 * spread)
    assert estimates(probabilities, classes, resamples=1000, seed=1)["accuracy"] == found
    assert f"{found:.3f}" == f"{found.value:.3f} [{found.ends[0]:.3f}, {found.ends[1]:.3f}]"


def test_the_interval_of_a_calibrated_model_reaches_down_to_a_small_error() -> None:
    probabilities, classes = answers(sharpness=1.0)
    found = estimates(probabilities, classes, resamples=200, seed=1)["calibration_error"]
    assert 0 <= found.ends[0] < found.value, "the noise of the bins is turned around, not doubled"
    overconfident = estimates(*answers(sharpness=3.0), resamples=200, seed=1)["calibration_error"]
    assert overconfident.ends[0] > 0.1


def test_a_gain_is_paired() -> None:
    probabilities, classes = answers(texts=400)
    assert accuracy_gain(probabilities, probabilities, classes, resamples=100, seed=1).high == 0
    wrong = probabilities.clone()
    wrong[:40] = torch.nn.functional.one_hot((classes[:40] + 1) % 4, 4).double()
    gain = accuracy_gain(probabilities, wrong, classes, resamples=1000, seed=1)
    lost = float((probabilities.argmax(1) == classes)[:40].double().sum()) / 400
    assert gain.value == pytest.approx(lost) and 0 < gain.ends[0] < lost < gain.ends[1]
    # The two accuracies are alone each 0.05 uncertain; their difference is 0.03.
    assert gain.half is not None and gain.half < 0.035


def test_one_text_says_nothing() -> None:
    probabilities, classes = answers(texts=1)
    found = estimates(probabilities, classes, resamples=100, seed=1)["accuracy"]
    assert (found.low, found.high) == (0.0, 1.0)


def test_the_seed_draws_the_texts_and_more_resamples_draw_more() -> None:
    probabilities, classes = answers(texts=150)
    found = [
        estimates(probabilities, classes, resamples=resamples, seed=seed)["macro_f1"]
        for seed, resamples in ((1, 50), (2, 50), (1, 51))
    ]
    assert len({one.value for one in found}) == 1 and len({one.ends for one in found}) == 3
    gains = [accuracy_gain(probabilities, 1 - probabilities, classes, resamples=50, seed=seed).ends for seed in (1, 2)]
    assert gains[0] != gains[1]


def test_more_of_a_calibrated_models_interval_lies_below_its_error_than_above() -> None:
    """Resampling adds noise to each bin, so resampled errors are larger: the interval turns that around."""
    found = estimates(*answers(sharpness=1.0), resamples=50, seed=1)["calibration_error"]
    low, high = found.ends
    assert found.value - low > 1.5 * (high - found.value) > 0
