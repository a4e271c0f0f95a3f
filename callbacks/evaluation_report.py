"""The report of an evaluation: tables with the paper's figures beside the measured ones, in every form."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_danube.callbacks.progress import can_draw, say
from lightning_danube.evaluation.data import EvaluationData
from lightning_danube.evaluation.results import Measured, PaperScores, paper_scores
from lightning_danube.evaluation.task import Evaluation
from lightning_danube.files import write_json, write_parquet, write_text
from lightning_danube.terminal import markdown_table, text_table
from lightning_danube.training.position import run_directory

TITLES = {
    "academic": "Academic benchmarks",
    "chat": "Chat, by a judge",
    "retrieval": "Answers from retrieved passages",
    "perplexity": "Perplexity",
    "needle": "Needle in a haystack",
}
SECONDS_BETWEEN_LINES = 30.0


class EvaluationReport(Callback):
    """Prints the tables of an evaluation, and writes them to the run's directory: `report.md`, `results.parquet`,
    `summary.json`, what was asked and answered to `documents/<part>.jsonl`, and a figure to TensorBoard.

    All but the figure are written after each part, so what is measured is kept whatever becomes of the rest.
    """

    def __init__(self) -> None:
        self.paper = paper_scores()
        self._began = self._last_line = time.monotonic()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, task = evaluation_of(trainer)
        self._began = self._last_line = time.monotonic()
        task.asked.on_progress = lambda title, done, total: self._progress(trainer, title, done, total)
        names = ", ".join(part.title for part in data.parts)
        say(trainer, f"model: {task.weights}, {task.config.parameters:,} parameters\nasked: {names}")

    def _progress(self, trainer: Trainer, title: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            say(trainer, f"  {title}: {done:,} of {total:,}")

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        _, task = evaluation_of(trainer)
        directory = run_directory(trainer)
        for row in task.results:
            if row.records:
                write_jsonl(directory / "documents" / f"{row.name}.jsonl", row.records)
                row.records = []
        latest = task.results[-1]
        say(trainer, f"  {latest.title}: {shown(latest)}, {latest.seconds:.0f} s")
        self._write(directory, task)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _, task = evaluation_of(trainer)
        directory = run_directory(trainer)
        for table in TITLES:
            rows = [row for row in task.results if row.table == table]
            if rows:
                header, cells = table_of(rows, self.paper, task.weights)
                say(trainer, "\n" + text_table(header, cells))
        for line in remarks(task.results):
            say(trainer, line)
        figure = figure_of(task.results, self.paper, task.weights) if can_draw(trainer) else None
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                if figure is not None:
                    logger.experiment.add_figure("evaluation", figure, trainer.global_step)
                logger.experiment.add_text("evaluation", markdown(task.results, self.paper, task.weights))
        say(trainer, f"written to {directory}/report.md, results.parquet and summary.json")

    def _write(self, directory: Path, task: Evaluation) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "report.md", markdown(task.results, self.paper, task.weights))
        write_results(directory / "results.parquet", task.results, self.paper, task.weights)
        summary = {
            "weights": task.weights,
            "parameters": task.config.parameters,
            "precision": task.trainer.precision,
            "seconds": round(time.monotonic() - self._began, 3),
            "paper": self.paper.source,
            "averages": {table: average for table in TITLES if (average := averages(task.results, table, self.paper))},
            "results": [row.as_row() | {"more": row.more} for row in task.results],
        }
        write_json(directory / "summary.json", summary)


# --- tables -----------------------------------------------------------------------------------------------------------


def shown(row: Measured) -> str:
    """A score with its interval, or that there is none."""
    if row.estimate is None:
        return "not run"
    times, digits = (100.0, 2) if row.percent else (1.0, 2)
    low, high = row.estimate.low, row.estimate.high
    text = f"{times * row.estimate.value:.{digits}f}"
    return text if low is None or high is None else f"{text} [{times * low:.1f}, {times * high:.1f}]"


def table_of(rows: Sequence[Measured], paper: PaperScores, weights: str) -> tuple[list[str], list[list[str]]]:
    """Header and cells of one table: the paper's columns where it has such rows, then the measured one."""
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
    """What a row's score is made of, as further columns."""
    if row.table == "academic" and "guessing" in row.more:
        return {"guessing": f"{100 * row.more['guessing']:.0f}"}
    if row.table == "perplexity" and row.more:
        places = {
            f"{one['first'] + 1}–{one['last'] + 1}": f"{one['perplexity']:.2f}" for one in row.more["by_position"]
        }
        return {"bits a byte": f"{row.more['bits_a_byte']:.3f}", **places}
    if row.table == "needle" and row.more:
        return {f"at {100 * depth:.0f} %": f"{100 * share:.0f}" for depth, share in row.more["by_depth"].items()}
    return {}


def averages(rows: Sequence[Measured], table: str, paper: PaperScores) -> dict[str, Any] | None:
    """Of the academic benchmarks that were run, in percent, for each column over these same ones; None for fewer than
    two."""
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
    """What was not run, and where a measurement is not the paper's, in plain words."""
    lines = [f"{row.title} was not run: {row.not_run}" for row in rows if row.not_run]
    by_note: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            by_note.setdefault(note, []).append(row.title)
    return lines + [f"{', '.join(titles)}: {note}" for note, titles in by_note.items()]


def markdown(rows: Sequence[Measured], paper: PaperScores, weights: str) -> str:
    parts = [f"# Evaluation of {weights}"]
    for table, title in TITLES.items():
        mine = [row for row in rows if row.table == table]
        if not mine:
            continue
        header, cells = table_of(mine, paper, weights)
        parts += [f"## {title}", markdown_table(header, cells)]
        if any(paper.of(row) for row in mine):
            parts.append(f"Columns of other models: {paper.source}. They are copied, not measured here.")
    parts.append("In brackets: 95 % intervals of what other questions of the same kind would give.")
    if lines := remarks(rows):
        parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"


# --- files ------------------------------------------------------------------------------------------------------------


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_results(path: Path, rows: Sequence[Measured], paper: PaperScores, weights: str) -> None:
    """One row a model and score: `measured` tells ours from the paper's."""
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
    """Bars of the rows that the paper has too, the measured one with its interval; None where there are none."""
    rows = [row for row in rows if row.estimate is not None and row.percent and paper.of(row)]
    if not rows:
        return None
    # Not pyplot's: that would keep the figure, and ask for a screen where there is one.
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
        label=f"{weights} (measured)",
        color="black",
        ecolor="tab:red",
    )
    axes.set_xticks([x + (columns - 1) * width / 2 for x in range(len(rows))], [row.title for row in rows])
    axes.set_ylabel("%")
    axes.legend(fontsize="small", ncols=2)
    return figure


def evaluation_of(trainer: Trainer) -> tuple[EvaluationData, Evaluation]:
    """
    Raises:
        ValueError: the run is of another task.
    """
    data, task = trainer.datamodule, trainer.lightning_module  # type: ignore[attr-defined]
    if not isinstance(data, EvaluationData) or not isinstance(task, Evaluation):
        raise ValueError("EvaluationReport reports on Evaluation with EvaluationData: remove it, or use both")
    return data, task
