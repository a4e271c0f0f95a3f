"""The report of an evaluation: tables, files and a figure with the paper's scores beside the measured ones."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_danube.evaluation.results import Measured, PaperScores, tables_of
from lightning_danube.files import write_json, write_parquet, write_text
from lightning_danube.outside.texts import in_figure, in_markdown
from lightning_danube.terminal import markdown_table, text_table


@dataclass(frozen=True)
class Report:
    """The rows that were measured so far, the paper's scores, and the name of the model."""

    rows: Sequence[Measured]
    paper: PaperScores
    weights: str

    def text(self) -> str:
        """Returns the tables and the remarks for a terminal."""
        tables = []
        for table in tables_of(self.rows):
            rows = [row for row in self.rows if row.table == table]
            tables.append("\n" + text_table(*table_of(rows, self.paper, self.weights)))
        return "\n".join([*tables, *remarks(self.rows)])

    def markdown(self) -> str:
        """Returns the tables and the remarks as a page."""
        parts = [f"# Evaluation of {in_markdown(self.weights)}"]
        for table, title in tables_of(self.rows).items():
            mine = [row for row in self.rows if row.table == table]
            header, cells = table_of(mine, self.paper, self.weights)
            parts += [f"## {title}", markdown_table(header, cells)]
            if any(self.paper.of(row) for row in mine):
                parts.append(f"Columns of other models: {self.paper.source}. They are copied, not measured here.")
        parts.append("In brackets: 95 % intervals of what other questions of the same kind would give.")
        if lines := remarks(self.rows):
            parts.append("\n".join(f"- {in_markdown(line)}" for line in lines))
        return "\n\n".join(parts) + "\n"

    def write(self, directory: Path, *, parameters: int, precision: str | int, seconds: float) -> None:
        """Writes `report.md`, `results.parquet` and `summary.json`."""
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "report.md", self.markdown())
        write_results(directory / "results.parquet", self.rows, self.paper, self.weights)
        found = {
            table: average for table in tables_of(self.rows) if (average := averages(self.rows, table, self.paper))
        }
        summary = {
            "weights": self.weights,
            "parameters": parameters,
            "precision": precision,
            "seconds": round(seconds, 3),
            "paper": self.paper.source,
            "averages": found,
            "results": [row.as_row() | {"more": row.more} for row in self.rows],
        }
        write_json(directory / "summary.json", summary)


# --- tables -----------------------------------------------------------------------------------------------------------


def shown(row: Measured) -> str:
    """Returns a score with its interval as a text, or "not run"."""
    if row.estimate is None:
        return "not run"
    times, digits = (100.0, 2) if row.percent else (1.0, 2)
    low, high = row.estimate.low, row.estimate.high
    text = f"{times * row.estimate.value:.{digits}f}"
    return text if low is None or high is None else f"{text} [{times * low:.1f}, {times * high:.1f}]"


def table_of(rows: Sequence[Measured], paper: PaperScores, weights: str) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the cells of one table: the paper's scores, if it has any, and the measured scores."""
    published = any(paper.of(row) for row in rows)
    details = [details_of(row) for row in rows]
    columns = list(dict.fromkeys(name for detail in details for name in detail))
    header = ["", "setting", *(paper.models if published else []), weights, "n", *columns]
    cells = []
    for row, detail in zip(rows, details, strict=True):
        theirs = [f"{figure:.2f}" for figure in paper.of(row) or []]
        if published and not theirs:
            theirs = ["–"] * len(paper.models)
        count = "–" if row.estimate is None else f"{row.estimate.n:,}"
        rest = [detail.get(name, "–") for name in columns]
        cells.append([row.title, row.setting, *theirs, shown(row), count, *rest])
    average = averages(rows, rows[0].table, paper)
    if average:
        of = f"average of {average['rows']}" + (f" of {len(rows)}" if average["rows"] < len(rows) else "")
        theirs = [f"{average['paper'][model]:.2f}" for model in paper.models] if published else []
        cells.append([of, "", *theirs, f"{average['measured']:.2f}", "", *([""] * len(columns))])
    return header, cells


def details_of(row: Measured) -> dict[str, str]:
    """Returns the details of a row's score: name of the additional column → cell."""
    if row.table == "academic" and "guessing" in row.more:
        return {"guessing": f"{100 * row.more['guessing']:.0f}"}
    if row.table == "perplexity" and row.more:
        places = {
            f"{one['first'] + 1}–{one['last'] + 1}": f"{one['perplexity']:.2f}" for one in row.more["by_position"]
        }
        return {"bits/byte": f"{row.more['bits_a_byte']:.3f}", **places}
    if row.table == "needle" and row.more:
        return {f"at {100 * depth:.0f} %": f"{100 * share:.0f}" for depth, share in row.more["by_depth"].items()}
    return {}


def averages(rows: Sequence[Measured], table: str, paper: PaperScores) -> dict[str, Any] | None:
    """Returns the average of each model over the academic benchmarks that were run, in percent.

    None for fewer than two benchmarks, and for other tables.
    """
    run = [row for row in rows if row.table == table == "academic" and row.estimate is not None and paper.of(row)]
    if len(run) < 2:
        return None
    theirs = {
        model: statistics.fmean((paper.of(row) or [])[column] for row in run)
        for column, model in enumerate(paper.models)
    }
    mine = statistics.fmean(100 * row.estimate.value for row in run if row.estimate)
    return {"rows": len(run), "names": [row.name for row in run], "measured": mine, "paper": theirs}


def remarks(rows: Sequence[Measured]) -> list[str]:
    """Returns the rows that were not run, and the differences of a measurement from the paper's setting."""
    lines = [f"{row.title} was not run: {row.not_run}" for row in rows if row.not_run]
    by_note: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            by_note.setdefault(note, []).append(row.title)
    return lines + [f"{', '.join(titles)}: {note}" for note, titles in by_note.items()]


# --- files ------------------------------------------------------------------------------------------------------------


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes one JSON object per line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_results(path: Path, rows: Sequence[Measured], paper: PaperScores, weights: str) -> None:
    """Writes a row for each model and score. `measured` is false for the paper's scores."""
    import pyarrow as pa

    flat = []
    for row in rows:
        mine = row.as_row()
        flat.append({"model": weights, "measured": True, **mine})
        for model, figure in zip(paper.models, paper.of(row) or [], strict=False):
            value = figure / 100 if row.percent else figure
            empty = dict.fromkeys(("stderr", "low", "high", "n", "not_run"))
            same = {"value": value, **empty, "notes": [paper.source], "seconds": None}
            flat.append({"model": model, "measured": False, **mine, **same})
    kinds = {"measured": pa.bool_(), "n": pa.int64(), "notes": pa.list_(pa.string())}
    numbers = ("value", "stderr", "low", "high", "seconds")
    schema = pa.schema([(name, kinds.get(name, pa.float64() if name in numbers else pa.string())) for name in flat[0]])
    write_parquet(path, flat, schema)


def figure_of(rows: Sequence[Measured], paper: PaperScores, weights: str) -> Any | None:
    """Returns a figure of the scores that the paper also has, or None without such scores. Measured bars have
    intervals."""
    rows = [row for row in rows if row.estimate is not None and row.percent and paper.of(row)]
    if not rows:
        return None
    # Not pyplot's Figure: pyplot would keep the figure, and ask for a screen if there is one.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 1.6 * len(rows)), 4.5), layout="constrained")
    axes = figure.add_subplot()
    columns = len(paper.models) + 1
    width = 0.85 / columns
    for column, model in enumerate(paper.models):
        values = [(paper.of(row) or [])[column] for row in rows]
        axes.bar([x + column * width for x in range(len(rows))], values, width, label=model, alpha=0.55)
    estimates = [row.estimate for row in rows if row.estimate is not None]
    values = [100 * one.value for one in estimates]
    below = [0.0 if one.low is None else 100 * (one.value - one.low) for one in estimates]
    above = [0.0 if one.high is None else 100 * (one.high - one.value) for one in estimates]
    places = [x + (columns - 1) * width for x in range(len(rows))]
    axes.bar(
        places,
        values,
        width,
        yerr=[below, above],
        capsize=2,
        label=in_figure(f"{weights} (measured)"),
        color="black",
        ecolor="tab:red",
    )
    axes.set_xticks([x + (columns - 1) * width / 2 for x in range(len(rows))], [in_figure(row.title) for row in rows])
    axes.set_ylabel("%")
    axes.legend(fontsize="small", ncols=2)
    return figure
