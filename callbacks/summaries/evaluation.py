"""Reports the scores of an evaluation while it runs and at its end."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_danube.callbacks.progress import can_draw, say
from lightning_danube.evaluation.data import EvaluationData
from lightning_danube.evaluation.report import Report, figure_of, shown, write_jsonl
from lightning_danube.evaluation.results import paper_scores
from lightning_danube.evaluation.task import Evaluation
from lightning_danube.training.contract import data_of
from lightning_danube.training.position import run_directory

SECONDS_BETWEEN_LINES = 30.0


class EvaluationReport(Callback):
    """Prints the tables of an evaluation, and writes them to the run's directory: `report.md`, `results.parquet` and
    `summary.json`. The questions and answers go to `documents/<part>.jsonl`, and a figure goes to TensorBoard.

    Everything but the figure is written after each part, so that an interrupted evaluation keeps its results.
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

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any, **named: Any) -> None:
        _, task = evaluation_of(trainer)
        directory = run_directory(trainer)
        for row in task.results:
            if row.records:
                write_jsonl(directory / "documents" / f"{row.name}.jsonl", row.records)
                row.records = []
        latest = task.results[-1]
        say(trainer, f"  {latest.title}: {shown(latest)}, {latest.seconds:.0f} s")
        Report(task.results, self.paper, task.weights).write(
            directory,
            parameters=task.config.parameters,
            precision=trainer.precision,
            seconds=time.monotonic() - self._began,
        )

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _, task = evaluation_of(trainer)
        report = Report(task.results, self.paper, task.weights)
        if text := report.text():
            say(trainer, text)
        figure = figure_of(report.rows, report.paper, report.weights) if can_draw(trainer) else None
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                if figure is not None:
                    logger.experiment.add_figure("evaluation", figure, trainer.global_step)
                logger.experiment.add_text("evaluation", report.markdown())
        say(trainer, f"written to {run_directory(trainer)}/report.md, results.parquet and summary.json")


def evaluation_of(trainer: Trainer) -> tuple[EvaluationData, Evaluation]:
    """Returns the run's data module and task.

    Raises:
        ValueError: the run is of another task.
    """
    problem = "EvaluationReport reports on Evaluation with EvaluationData: remove it, or use both"
    data, task = data_of(trainer, EvaluationData, problem), trainer.lightning_module
    if not isinstance(task, Evaluation):
        raise ValueError(problem)
    return data, task
