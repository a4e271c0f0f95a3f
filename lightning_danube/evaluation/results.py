"""Measured scores with their uncertainty, and the paper's beside them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning_danube.intervals import wilson

Table = Literal["academic", "chat", "retrieval", "perplexity", "needle"]
Z = 1.959964
"""Standard errors to each side that hold 95 % of a normal distribution."""


class Estimate(NamedTuple):
    """A mean over documents, its standard error, and the ends of a 95 % interval; of a single document neither is
    known, and all three are None. The interval says what other questions of the kind would move, nothing else."""

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    n: int


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean and its interval: Wilson's where each document is right or wrong, as it holds near 0 and 1 and for few
    documents, else the normal one."""
    n, value = len(values), statistics.fmean(values)
    if n < 2:
        return Estimate(value, None, None, None, n)
    stderr = statistics.stdev(values) / math.sqrt(n)
    if set(values) <= {0.0, 1.0}:
        return Estimate(value, stderr, *wilson(value, n), n)
    return Estimate(value, stderr, value - Z * stderr, value + Z * stderr, n)


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

    table: Table
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
        found = self.estimate._asdict() if self.estimate else dict.fromkeys(Estimate._fields)
        return {
            "table": self.table,
            "name": self.name,
            "title": self.title,
            "setting": self.setting,
            **found,
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
