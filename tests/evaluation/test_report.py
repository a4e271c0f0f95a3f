"""Tables, averages and remarks of an evaluation's report. Whole runs: test_run.py."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lightning_danube.evaluation.report import (
    Report,
    averages,
    details_of,
    figure_of,
    remarks,
    shown,
    table_of,
    write_results,
)
from lightning_danube.evaluation.results import Measured, PaperScores, mean_of, tables_of

PAPER = PaperScores("the paper", ["Small", "Large"], {"academic": {"a": [10.0, 50.0], "b": [20.0, 70.0]}})
A = Measured("academic", "a", "Task A", "0-shot acc", mean_of([1.0, 0.0, 1.0, 0.0]))
B = Measured("academic", "b", "Task B", "0-shot acc", mean_of([1.0, 1.0, 1.0, 0.0]), more={"guessing": 0.25})
MISSING = Measured("academic", "c", "Task C", "0-shot acc", not_run="there is no file")


def test_an_average_is_over_the_rows_that_both_have() -> None:
    found = averages([A, B, MISSING], "academic", PAPER)
    assert found == {"rows": 2, "names": ["a", "b"], "measured": 62.5, "paper": {"Small": 15.0, "Large": 60.0}}
    assert averages([A, MISSING], "academic", PAPER) is None  # of one row
    assert averages([A, B], "chat", PAPER) is None


def test_the_papers_scores_stand_beside_the_measured_ones() -> None:
    header, cells = table_of([A, B, MISSING], PAPER, "mine")
    assert header == ["", "setting", "Small", "Large", "mine", "n", "guessing"]
    # Wilson's interval of 2 in 4.
    assert cells[0] == ["Task A", "0-shot acc", "10.00", "50.00", "50.00 [15.0, 85.0]", "4", "–"]
    assert cells[1][-1] == "25"
    assert cells[2][2:] == ["–", "–", "not run", "–", "–"]
    assert cells[3] == ["average of 2 of 3", "", "15.00", "60.00", "62.50", "", ""]


def test_a_score_of_one_document_has_no_interval() -> None:
    assert shown(Measured("chat", "x", "X", "", mean_of([7.0]), percent=False)) == "7.00"


def test_remarks_with_the_same_words_are_one_line() -> None:
    first, second = (Measured("chat", name, name.upper(), "", notes=["cut"]) for name in "xy")
    assert remarks([MISSING, first, second]) == ["Task C was not run: there is no file", "X, Y: cut"]


def test_text_and_page_hold_each_table_and_remark() -> None:
    report = Report([A, B, MISSING], PAPER, "mine")
    assert report.text().startswith("\n") and report.text().endswith("\nTask C was not run: there is no file")
    page = report.markdown()
    assert page.startswith("# Evaluation of mine\n\n## Academic benchmarks\n\n| ") and "## Chat" not in page
    assert "Columns of other models: the paper. They are copied, not measured here." in page
    assert page.endswith("- Task C was not run: there is no file\n")


def test_files_tell_measured_scores_from_the_papers(tmp_path: Path) -> None:
    Report([A, B], PAPER, "mine").write(tmp_path / "run", parameters=7, precision="32-true", seconds=1.23456)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"report.md", "results.parquet", "summary.json"}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["seconds"] == 1.235 and summary["averages"]["academic"]["measured"] == 62.5
    rows = pq.read_table(tmp_path / "run" / "results.parquet").to_pylist()
    values = {(row["model"], row["name"]): (row["measured"], row["value"]) for row in rows}
    assert values["mine", "a"] == (True, 0.5) and values["Large", "a"] == (False, 0.5)
    assert len(rows) == 6
    write_results(tmp_path / "missing.parquet", [MISSING], PAPER, "mine")
    (row,) = pq.read_table(tmp_path / "missing.parquet").to_pylist()
    assert row["value"] is None and row["not_run"] == "there is no file"


def test_a_table_that_the_report_does_not_know_comes_last() -> None:
    rows = [Measured(table, table, table, "") for table in ("copying", "needle", "academic", "copying")]
    assert list(tables_of(rows).items()) == [
        ("academic", "Academic benchmarks"),
        ("needle", "Needle in a haystack"),
        ("copying", "Copying"),
    ]


def test_positions_are_counted_from_1() -> None:
    by_position = [{"first": 0, "last": 63, "perplexity": 9.5}, {"first": 64, "last": 99, "perplexity": 8.25}]
    row = Measured("perplexity", "wiki", "wiki", "", more={"bits_a_byte": 1.2341, "by_position": by_position})
    assert details_of(row) == {"bits/byte": "1.234", "1–64": "9.50", "65–100": "8.25"}
    needle = Measured("needle", "needle_9", "9 tokens", "", more={"by_depth": {0.0: 0.5, 0.25: 1.0}})
    assert details_of(needle) == {"at 0 %": "50", "at 25 %": "100"}


def test_a_bar_has_its_interval_around_its_own_value() -> None:
    figure = figure_of([A, B, MISSING], PAPER, "mine")
    assert figure is not None
    (axes,) = figure.axes
    heights = {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers if len(bars) == 2}
    assert heights == {"Small": [10.0, 20.0], "Large": [50.0, 70.0], "mine (measured)": [50.0, 75.0]}
    (measured,) = [bars for bars in axes.containers if bars.get_label() == "mine (measured)"]
    _, _, (lines,) = measured.errorbar.lines
    ends = [[100 * end for end in row.estimate.ends] for row in (A, B) if row.estimate is not None]
    assert [[point[1] for point in segment] for segment in lines.get_segments()] == [
        [pytest.approx(low), pytest.approx(high)] for low, high in ends
    ]


def test_an_average_leaves_out_rows_that_were_not_run_for_all_models() -> None:
    tables = {"academic": PAPER.tables["academic"] | {"c": [90.0, 90.0]}}
    found = averages([A, B, MISSING], "academic", PaperScores("the paper", PAPER.models, tables))
    assert found == averages([A, B, MISSING], "academic", PAPER)
