"""Tables of a quantization evaluation. Whole runs: test_run.py."""

from typing import Any

import numpy as np
import pytest

from lightning_danube.intervals import Estimate
from lightning_danube.quantization.levels import FULL, Level
from lightning_danube.quantization.measured import Content, Cost, MeasuredLevel
from lightning_danube.quantization.summary import (
    LevelResults,
    failure_notes,
    frontier_figure,
    level_line,
    noise,
    with_half,
)

INT4, NF4, HQQ = (Level("rounding", "4/64"), Level("bitsandbytes", "nf4"), Level("hqq", "4/64"))
GENERATOR = np.random.default_rng(0)
NATS = GENERATOR.normal(3.0, 0.1, (8, 16))


def measured(worse: float, size: int, cost: Cost | None = None) -> MeasuredLevel:
    nats = {16: NATS + worse, 32: NATS + 2 * worse}
    right = np.arange(10) % 2 == 0
    same = GENERATOR.random((8, 16)) < 0.5
    return MeasuredLevel(Content(size, 8 * size, {}), 2.0, nats, np.full((8, 16), worse), same, right, cost)


DONE = {FULL: measured(0.0, 2**22, Cost(1000.0, 50.0, 2**20)), INT4: measured(0.1, 2**20)}
FAILED = {NF4: "not installed", HQQ: "not installed"}


def results(*context_lengths: int) -> LevelResults:
    return LevelResults.of(DONE, FAILED, [INT4, NF4, HQQ], context_lengths)


def test_there_is_a_table_for_what_was_measured() -> None:
    assert [table.header[0] for table in results(16).tables] == ["level", "speed and memory"]
    both = results(16, 32)
    assert [table.header[0] for table in both.tables] == ["level", "perplexity by context", "speed and memory"]
    assert [row[0] for row in both.tables[0].body] == ["full", INT4.name]
    assert both.tables[2].body == [["full", "1,000", "50.0", "1"], [INT4.name, "–", "–", "–"]]


def test_each_level_is_a_row_of_the_file_measured_or_not() -> None:
    rows = results(16).flat_rows()
    assert [(row["level"], row["not_measured"]) for row in rows] == [
        ("full", None), (INT4.name, None), (NF4.name, "not installed"), (HQQ.name, "not installed"),
    ]  # fmt: skip
    assert all(row.keys() == rows[0].keys() for row in rows) and rows[2]["perplexity"] is None


def test_a_reason_is_told_once_for_all_its_levels() -> None:
    assert failure_notes(FAILED) == [f"{NF4.name}, {HQQ.name}: not measured: not installed"]
    text, page = results(16).text(), results(16).markdown("mine", "text.txt")
    for shown in (text, page):
        assert shown.count("not measured: not installed") == 1
    assert page.startswith("# mine in fewer bits, on text.txt\n\n| level |")
    assert results(16).summary("mine", "text.txt", "32-true")["not_measured"] == {
        NF4.name: "not installed", HQQ.name: "not installed",
    }  # fmt: skip


def test_a_finished_level_is_a_line() -> None:
    assert level_line(NF4, DONE, FAILED, 16) == f"  {NF4.name}: not measured: not installed"
    value = float(np.exp(NATS.mean()))
    assert level_line(FULL, DONE, FAILED, 16) == f"  full: 1.00 bits/weight, perplexity {value:.3f}, 2 s"
    # exp(0.1) - 1, the same for all windows.
    assert f"perplexity {value * np.exp(0.1):.3f} (+10.52 % [+10.52, +10.52]), 2 s" in level_line(
        INT4, DONE, FAILED, 16
    )


def test_cells_show_the_half_of_an_interval_and_mark_noise() -> None:
    assert with_half(Estimate(2.0, 1.75, 2.25, 9, "student")) == "2.000 ± 0.250"
    assert with_half(Estimate(2.0, None, None, 1, "student")) == "2.000"
    assert [noise(Estimate(0.1, low, 0.2, 9, "student")) for low in (-0.1, 0.05)] == ["≈", " "]


def test_names_in_the_figure_cover_neither_each_other_nor_a_point() -> None:
    (row,) = [row for row in results(16).flat_rows() if row["tensor_bytes"] and row["level"] != "full"]
    rows = [
        row | {"level": f"{method}:{bits}/64", "method": method, "tensor_bytes": size, "perplexity_change": change}
        for method, bits, size, change in (  # bytes
            ("gguf", 4, 10.0, 0.03), ("hqq", 4, 10.1, 0.03), ("rounding", 4, 10.2, 0.031), ("gguf", 2, 9.9, 0.029),
            ("hqq", 2, 30.0, 0.5), ("rounding", 8, 40.0, 0.001),
        )
    ]  # fmt: skip
    figure = frontier_figure(rows)
    axes: Any = figure.axes[0]
    boxes = [name.get_window_extent() for name in axes.texts]
    assert len(boxes) == 6
    points = axes.transData.transform([name.xy for name in axes.texts])
    for place, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:place])
        assert not any(box.contains(*point) for point in points)
        assert axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
    assert axes.get_ylabel() == "perplexity above the full model's, %\n(linear up to 1, logarithmic above)"


def test_points_of_the_figure_are_sizes_and_changes_with_their_intervals() -> None:
    rows = [row for row in results(16).flat_rows() if row["tensor_bytes"]]
    rows[1] |= {"perplexity_change": 0.1, "perplexity_change_low": 0.06, "perplexity_change_high": 0.16}
    cached = rows[1] | {"level": "rounding:4/64+cache-q4_0", "tensor_bytes": 2**19}
    axes: Any = frontier_figure([*rows, cached]).axes[0]
    (points,) = [bars for bars in axes.containers if len(bars.lines[0].get_xdata())]
    line, _, (bar,) = points.lines
    assert line.get_xydata().tolist() == [[1.0, pytest.approx(10.0)]]
    ((low, high),) = bar.get_segments()
    assert (low[1], high[1]) == (pytest.approx(6.0), pytest.approx(16.0))
