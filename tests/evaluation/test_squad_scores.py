"""Exact match and F1 of short answers, against torchmetrics' own."""

import pytest
from torchmetrics.functional.text import squad

from lightning_danube.evaluation.squad_scores import compute_exact, compute_f1


@pytest.mark.parametrize(
    ("gold", "predicted"),
    [
        ("The Nile", "nile"),
        ("the river Nile", "It is the Nile, the river."),
        ("a cat", "an cat!"),
        ("white and green", "green green"),
        ("green green stone", "green and green"),
        ("stone", "rock"),
        ("under the bridge", ""),
        ("it's", "its"),
    ],
)
def test_scores_are_those_of_torchmetrics(gold: str, predicted: str) -> None:
    reference = squad(
        {"prediction_text": predicted, "id": "0"}, {"answers": {"answer_start": [0], "text": [gold]}, "id": "0"}
    )
    assert compute_exact(gold, predicted) * 100 == pytest.approx(float(reference["exact_match"]))
    # Theirs is float32.
    assert compute_f1(gold, predicted) * 100 == pytest.approx(float(reference["f1"]), rel=1e-6)


def test_answers_without_words_are_equal_to_each_other_alone() -> None:
    assert compute_f1("the", "a") == 1.0 and compute_f1("the", "cat") == 0.0
