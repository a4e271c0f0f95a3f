"""Measured scores with their uncertainty, and the paper's beside them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_danube.intervals import Estimate, normal, wilson

TableName = Literal["academic", "chat", "retrieval", "perplexity", "needle"]


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean over documents: with Wilson's interval where each document is right or wrong, else the normal one.

    The interval says how much other questions of the same kind would change the mean, and nothing else.
    """
    mean = normal(values)
    if len(values) > 1 and set(values) <= {0.0, 1.0}:
        return wilson(mean.value, mean.n, mean.stderr)
    return mean


def columns_of(estimate: Estimate | None) -> dict[str, float | None]:
    """An estimate as values for files; all are None if there is no estimate."""
    return {name: getattr(estimate, name, None) for name in ("value", "stderr", "low", "high", "n")}


@dataclass
class Measured:
    """One row of a table: a score, or why there is none.

    Args:
        name: the row's key, the same as among the paper's scores where it is one of those.
        setting: how it was asked, such as "25-shot acc_norm".
        percent: whether it is a share, which tables show in percent.
        not_run: why nothing was measured.
        notes: where the measurement departs from the paper's, in plain words.
        more: further figures, for the files.
        records: what is kept of each document, for jsonl.
    """

    table: TableName
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
        """Flat, for files."""
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
    """What was published: table → row → one figure for each model (shares in percent), and where it stands."""

    source: str
    models: list[str]
    tables: dict[str, dict[str, list[float]]]

    def of(self, row: Measured) -> list[float] | None:
        return self.tables.get(row.table, {}).get(row.name)


def paper_scores() -> PaperScores:
    read = json.loads(Path(__file__).with_name("paper_scores.json").read_text("utf-8"))
    source, models = read.pop("source"), read.pop("models")
    return PaperScores(source, models, read)
