"""Measured scores with their uncertainty, and the paper's scores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from lightning_danube.intervals import Estimate, normal, wilson

TABLES = {
    "academic": "Academic benchmarks",
    "chat": "Chat, by a judge",
    "retrieval": "Answers from retrieved passages",
    "perplexity": "Perplexity",
    "needle": "Needle in a haystack",
}
"""Key of a table of the report → its title, in the order of the report. Tables with other keys follow them."""


def tables_of(rows: Sequence[Measured]) -> dict[str, str]:
    """Returns key → title of the tables that have rows, in the order of the report."""
    used = {row.table for row in rows}
    known = {table: title for table, title in TABLES.items() if table in used}
    return known | {row.table: row.table.capitalize() for row in rows if row.table not in TABLES}


def mean_of(values: Sequence[float]) -> Estimate:
    """Returns the mean over documents, with Wilson's interval if each value is 0 or 1, else with the normal interval.

    The interval covers only the variation between samples of questions of this kind.
    """
    mean = normal(values)
    if len(values) > 1 and set(values) <= {0.0, 1.0}:
        return wilson(mean.value, mean.n, mean.stderr)
    return mean


def columns_of(estimate: Estimate | None) -> dict[str, float | None]:
    """Returns an estimate as values for files; all values are None if there is no estimate."""
    return {name: getattr(estimate, name, None) for name in ("value", "stderr", "low", "high", "n")}


@dataclass
class Measured:
    """One row of a table: a score, or the reason why there is no score.

    Args:
        table: the key of the row's table. If `TABLES` does not have it, the key is also the title.
        name: the row's key; equal to the key among the paper's scores if the paper has this score.
        setting: how the questions were asked, such as "25-shot acc_norm".
        percent: whether the score is a share, which tables show in percent.
        not_run: reason why nothing was measured.
        notes: differences of the measurement from the paper's, in plain words.
        more: additional values for the files.
        records: a record of each document, for jsonl.
    """

    table: str
    name: str
    title: str
    setting: str
    estimate: Estimate | None = None
    percent: bool = True
    not_run: str | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    more: dict[str, Any] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)

    def as_row(self) -> dict[str, Any]:
        """Returns the row as flat values, for files."""
        return {
            "table": self.table,
            "name": self.name,
            "title": self.title,
            "setting": self.setting,
            **columns_of(self.estimate),
            "not_run": self.not_run,
            "notes": self.notes,
            "seconds": round(self.seconds, 3),
        }


class PaperScores(NamedTuple):
    """Published scores: table → row → one score for each model (shares in percent), and their source."""

    source: str
    models: list[str]
    tables: dict[str, dict[str, list[float]]]

    def of(self, row: Measured) -> list[float] | None:
        return self.tables.get(row.table, {}).get(row.name)


def paper_scores() -> PaperScores:
    read = json.loads(Path(__file__).with_name("paper_scores.json").read_text("utf-8"))
    source, models = read.pop("source"), read.pop("models")
    return PaperScores(source, models, read)
