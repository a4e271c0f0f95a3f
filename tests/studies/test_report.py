"""The reports of studies, from results that were made by hand."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pyarrow.parquet
import pytest
from scipy import stats

from lightning_danube.intervals import bootstrap
from lightning_danube.studies import comparison
from lightning_danube.studies.design import Design
from lightning_danube.studies.report import write_report, write_search_report
from lightning_danube.studies.trials import Result

DESIGN = Design(
    "heads", "base", "loss", variants={"mha": {}, "gqa": {}}, baseline="mha", also=("speed",), seeds=(1, 2, 3, 4)
)
LOSSES = {"mha": (3.0, 3.5, 4.0, 4.5), "gqa": (3.25, 9.0, 4.125, 4.5)}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "RESAMPLES", 200)


def results(failed: int | None = None) -> list[Result]:
    """A run a seed, whose speed is ten times its loss; one run of gqa may have failed."""
    return [
        Result(variant, seed, "failed", {}, "no disk")
        if (variant, seed) == ("gqa", failed)
        else Result(variant, seed, "complete", {"loss": loss, "speed": 10 * loss}, commit="abc", machine="here")
        for variant, losses in LOSSES.items()
        for seed, loss in enumerate(losses, start=1)
    ]


def cells(text: str, first: str) -> list[str]:
    """The cells of the first row that begins so."""
    return re.split(r"  +", next(line for line in text.splitlines() if line.startswith(first + " ")))


def test_a_table_shows_the_difference_with_both_intervals(tmp_path: Path) -> None:
    found = results(failed=2)
    text = write_report(DESIGN, found, tmp_path, "study …")
    # Seed 2 of gqa failed: the differences are those of seeds 1, 3 and 4.
    differences = [0.25, 0.125, 0.0]
    student = stats.ttest_1samp(differences, 0.0)
    low, high = student.confidence_interval(0.95)
    resampled = bootstrap(np.array(differences), np.mean, resamples=200).ends
    variant, seeds, mean, difference, interval, by_bootstrap, p = cells(text, "gqa")
    assert (variant, seeds, mean) == ("gqa", "3", f"{(3.25 + 4.125 + 4.5) / 3:.4f}")
    assert difference == "+0.125" and interval == f"{low:+.4g} to {high:+.4g}"
    assert by_bootstrap == f"{resampled[0]:+.4g} to {resampled[1]:+.4g}" != interval
    assert float(p) == pytest.approx(student.pvalue, rel=0.05)
    assert cells(text, "mha")[:3] == ["mha", "4", "3.7500"]
    assert "gqa-seed2: failed: no disk" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["runs"], summary["runs_complete"]) == (8, 7)
    assert summary["commits"] == ["abc"] and summary["machines"] == ["here"]
    assert summary["comparisons"][0]["low"] == pytest.approx(low) and summary["comparisons"][0]["seeds"] == 3
    assert len(pyarrow.parquet.read_table(tmp_path / "study.parquet")) == 8


def test_other_metrics_stand_with_half_their_interval(tmp_path: Path) -> None:
    text = write_report(DESIGN, results(failed=2), tmp_path, "study …")
    low, high = stats.ttest_1samp([2.5, 1.25, 0.0], 0.0).confidence_interval(0.95)
    other = text.partition("Beside it")[2]
    assert cells(other, "gqa")[1] == f"39.5833 (+1.2 ± {(high - low) / 2:.2g})"
    assert cells(other, "mha")[1] == "37.5000"
    assert f"(+1.2 ± {(high - low) / 2:.2g})" in (tmp_path / "study.md").read_text()


@pytest.mark.parametrize(("better", "order"), [("lower", [1, 0, 2]), ("higher", [2, 0, 1])])
def test_the_best_settings_come_first(better: Literal["lower", "higher"], order: list[int], tmp_path: Path) -> None:
    trials = [
        SimpleNamespace(
            value=value,
            params={"a.rate": rate},
            user_attrs={
                "number": number,
                "metrics": {"loss": value},
                "by_seed": {"1": {"loss": value - 1}, "2": {"loss": value + 1}},
            },
        )
        for number, (value, rate) in enumerate([(3.0, 0.1), (2.0, 0.2), (4.0, 0.3)])
    ]
    trials.append(SimpleNamespace(value=None, params={"a.rate": 0.4}, user_attrs={"number": 3, "error": "no disk"}))
    design = Design("rates", "base", "loss", search={"a.rate": [0.1, 0.2]}, better=better, seeds=(1, 2))
    search: Any = SimpleNamespace(design=design, tried=lambda: trials, importances=dict, marginals=dict)
    text = write_search_report(search, tmp_path, "study …")
    table = [line.split() for line in text.splitlines() if re.match(r"\d +\d", line)]
    assert [int(row[0]) for row in table] == order
    # Two seeds that are 2 apart: one standard error, times Student's 12.7 for one degree of freedom.
    assert table[0][1:4] == [f"{trials[order[0]].value:.4f}", "±", "13"]
    assert "trial 3: failed: no disk" in text
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best"] == {"value": trials[order[0]].value, "settings": trials[order[0]].params}
    assert (summary["trials"], summary["trials_complete"]) == (4, 3)
    assert len(pyarrow.parquet.read_table(tmp_path / "study.parquet")) == 8


def test_a_study_of_one_seed_has_no_interval(tmp_path: Path) -> None:
    text = write_report(replace(DESIGN, seeds=(1,), also=()), results()[::4], tmp_path, "study …")
    assert cells(text, "gqa") == ["gqa", "1", "3.2500", "+0.25"]
    assert "gqa: +0.25 in loss from one seed, which tells nothing: run more" in text
