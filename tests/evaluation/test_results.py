"""Scores with their uncertainty, against independent implementations; the paper's figures."""

import math

import pytest
from scipy import stats

from lightning_danube.evaluation.academic_tasks import PAPER_TASKS
from lightning_danube.evaluation.results import Measured, mean_of, paper_scores
from lightning_danube.intervals import Estimate


@pytest.mark.parametrize(("right", "n"), [(0, 5), (3, 5), (5, 5), (130, 299)])
def test_shares_have_wilsons_interval(right: int, n: int) -> None:
    found = mean_of([1.0] * right + [0.0] * (n - right))
    expected = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert (found.value, found.n) == (right / n, n)
    # The quantile is written with seven digits.
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_other_means_have_the_normal_interval() -> None:
    values = [3.0, 7.0, 8.0, 5.5]
    found = mean_of(values)
    assert found.stderr == pytest.approx(stats.sem(values))
    assert (found.low, found.high) == pytest.approx(stats.norm.interval(0.95, found.value, found.stderr), abs=1e-5)


def test_one_document_has_no_interval() -> None:
    assert mean_of([1.0]) == Estimate(1.0, None, None, 1, "normal")


def test_the_papers_figures_are_whole_and_average_to_what_it_prints() -> None:
    paper = paper_scores()
    academic = paper.tables["academic"]
    assert list(academic) == [task.name for task in PAPER_TASKS] and "2407.09276" in paper.source
    for table in paper.tables.values():
        assert all(len(figures) == len(paper.models) == 7 for figures in table.values())
    averages = [math.fsum(column) / 12 for column in zip(*academic.values(), strict=True)]
    # Printed with two digits; the last two are not printed.
    assert averages == pytest.approx([58.32, 68.98, 57.07, 63.21, 76.01, 48.25, 50.45], abs=0.006)
    turns = zip(*(paper.tables["chat"][f"mt_bench_turn_{n}"] for n in (1, 2)), strict=True)
    # Means of rounded turns; Phi-3's 7.975 and Danube2's 5.645 are rounded apart.
    assert [sum(pair) / 2 for pair in turns] == pytest.approx(paper.tables["chat"]["mt_bench"], abs=0.0101)


def test_a_row_without_a_score_is_flat_too() -> None:
    row = Measured("academic", "coqa", "CoQA", "0-shot f1", not_run="there is no file").as_row()
    assert (row["value"], row["n"], row["not_run"]) == (None, None, "there is no file")
