"""Tables of a classifier's summary. Whole runs: test_run.py."""

import dataclasses
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from lightning_danube.classification.summary import (
    Compared,
    class_table,
    confusion_figure,
    detail_table,
    flat,
    list_rejected,
)
from lightning_danube.classification.task import Classified
from lightning_danube.intervals import Estimate


def test_classes_are_sorted_and_a_long_table_shows_both_ends() -> None:
    counts = {f"c{n:02d}": {"train": n, "validation": 1, "test": 0} for n in range(30)}
    lines = class_table(counts).splitlines()
    assert [line.split()[0] for line in lines[2:12]] == [f"c{n}" for n in range(29, 19, -1)]
    assert lines[12].startswith("… 10 more") and lines[13].split()[0] == "c09"
    assert lines[-1].split() == ["all", "30", "435", "30", "0"]
    assert len(class_table(dict(list(counts.items())[:20])).splitlines()) == 2 + 20 + 1


def test_the_worst_class_is_the_last_one() -> None:
    details = [{"n": n, "precision": f1, "recall": f1, "f1": f1} for n, f1 in ((1, 0.5), (2, 0.9), (3, 0.1))]
    lines = detail_table(["a", "b", "c"], details).splitlines()[2:]
    assert [line.split()[0] for line in lines] == ["b", "a", "c"]


def compared(classes: int) -> Compared:
    torch.manual_seed(2)
    classes_N = torch.arange(60) % classes
    sure_NC = torch.nn.functional.one_hot(classes_N, classes).double() * 0.8 + 0.2 / classes
    even_NC = torch.full((60, classes), 1 / classes, dtype=torch.float64)
    labels = [f"c{n}" for n in range(classes)]
    return Compared(
        "test", labels, "base", Classified(torch.arange(60), classes_N, sure_NC), even_NC, even_NC, 0.25, 50, seed=0
    )


@pytest.mark.parametrize("classes", [2, 3])
def test_scores_stand_beside_the_baselines(classes: int) -> None:
    scored = compared(classes).scored()
    summary, text = scored.summary(), scored.text()
    assert summary["n"] == 60 and summary["accuracy"] == 1.0 and summary["loss"] == 0.25
    # Even probabilities: the first class is taken, which is right for one in C.
    assert summary["baselines"]["tfidf"]["accuracy"] == pytest.approx(1 / classes)
    assert summary["accuracy_above_tfidf"] == pytest.approx(1 - 1 / classes)
    low, high = summary["accuracy_above_tfidf_interval"]
    assert low < summary["accuracy_above_tfidf"] < high
    assert summary["confusion"] == torch.diag(torch.full((classes,), 60 // classes)).tolist()
    assert ("average_precision" in summary) == ("average precision for 'c1'" in text) == (classes == 2)
    for title in ("majority class", "TF-IDF + logistic regression", "LoRA on base"):
        assert text.count(f"\n{title}") == 1
    # Every class is right, and every resample of right answers is right.
    assert re.search(r"^LoRA on base +1\.000 \[1\.000, 1\.000\] +1\.000 \[", text, re.MULTILINE)
    assert f"accuracy above TF-IDF's: {1 - 1 / classes:+.3f} [{low:+.3f}, {high:+.3f}]" in text


class Rejected(NamedTuple):
    row: int
    message: str


def test_all_rejected_rows_are_listed_and_the_first_are_shown(tmp_path: Path) -> None:
    rejected = [Rejected(n, f"row {n}: empty") for n in range(5)]
    data: Any = SimpleNamespace(rejected=rejected, causes=lambda: {"empty": 5})
    path = tmp_path / "run" / "rejected.jsonl"
    first, *shown = list_rejected(data, path).splitlines()
    assert first == f"5 rows left out (5 × empty), listed in {path}"
    assert shown == [f"  row {n}: empty" for n in range(3)]
    assert [json.loads(line)["row"] for line in path.read_text().splitlines()] == [0, 1, 2, 3, 4]


def test_the_gain_is_over_tfidf_and_not_over_the_majority() -> None:
    one = compared(3)
    # TF-IDF is right about two of the three classes, the majority class about one.
    tfidf_NC = one.model.probabilities_NC.clone()
    tfidf_NC[one.model.classes_N == 2] = torch.tensor([0.9, 0.1, 0.0], dtype=torch.float64)
    summary = dataclasses.replace(one, tfidf_NC=tfidf_NC).scored().summary()
    assert summary["accuracy_above_tfidf"] == pytest.approx(1 / 3)
    accuracies = {name: scores["accuracy"] for name, scores in summary["baselines"].items()}
    assert accuracies == {"majority": pytest.approx(1 / 3), "tfidf": pytest.approx(2 / 3)}


def test_baselines_are_trained_on_the_training_texts_alone() -> None:
    texts = {"train": ["river rain", "stone iron", "stone sand", "iron ore"], "test": ["rain", "iron", "rain"]}
    classes = {"train": [1, 0, 0, 0], "test": [0, 1, 1]}
    data: Any = SimpleNamespace(
        labels=["hard", "wet"],
        seed=3,
        encoded={split: SimpleNamespace(classes=torch.tensor(numbers)) for split, numbers in classes.items()},
        splits={split: [SimpleNamespace(text=text) for text in given] for split, given in texts.items()},
    )
    model = Classified(torch.arange(3), torch.tensor(classes["test"]), torch.full((3, 2), 0.5))
    found = Compared.of(data, "base", "test", model, loss=0.5, resamples=20)
    assert found.majority_NC.tolist() == [[0.75, 0.25]] * 3
    # The test labels say the opposite of what the words say in training.
    assert (found.tfidf_NC[:, 1] > found.tfidf_NC[1, 1]).tolist() == [True, False, True]
    assert (found.seed, found.resamples, found.loss, list(found.labels)) == (3, 20, 0.5, ["hard", "wet"])
    # Where a part of the texts was classified, the baselines classify the same texts.
    part = Classified(torch.tensor([1, 2]), torch.tensor(classes["test"][1:]), torch.full((2, 2), 0.5))
    again = Compared.of(data, "base", "test", part, loss=0.5, resamples=20)
    assert torch.equal(again.tfidf_NC, found.tfidf_NC[1:]) and len(again.majority_NC) == 2


def test_an_interval_begins_at_its_lower_end() -> None:
    assert flat({"a": Estimate(0.5, 0.25, 0.75, 9, "bootstrap"), "b": Estimate(1.0, None, None, 1, "bootstrap")}) == {
        "a": 0.5, "a_interval": [0.25, 0.75], "b": 1.0, "b_interval": [None, None],
    }  # fmt: skip


def test_a_figure_of_hostile_labels_can_be_drawn() -> None:
    """matplotlib reads what stands between dollars as a formula, and refuses a wrong one when the figure is drawn."""
    labels = ["$\\frac$", "a\nb\x1b[31m", "$"]
    figure = confusion_figure(torch.eye(3, dtype=torch.long), labels)
    figure.canvas.draw()
