"""Reports what each number of bits costs a model."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_danube.callbacks.progress import can_draw, say
from lightning_danube.files import write_json, write_parquet, write_text
from lightning_danube.quantization.levels import Level
from lightning_danube.quantization.summary import LevelResults, failure_notes, frontier_figure, level_line
from lightning_danube.quantization.task import QuantizationEvaluation
from lightning_danube.quantization.text_windows import TextWindows
from lightning_danube.signals import Stopped
from lightning_danube.terminal import amount, markdown_table
from lightning_danube.training.contract import data_of
from lightning_danube.training.position import run_directory


class QuantizationSummary(Callback):
    """Prints a line when a level is measured and a table when all levels are. Writes `quantization.md`,
    `quantization.parquet` and `summary.json` into the run's directory, and a figure to TensorBoard."""

    def __init__(self) -> None:
        self._told: set[Level] = set()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, task = quantization_of(trainer)
        windows = ", ".join(
            f"{amount(len(data.windows(length)), 'window')} of {length:,}" for length in data.context_lengths
        )
        lines = [
            f"model: {task.config.parameters:,} parameters, {task.weights}",
            f"text: {data.text.path}, {len(data.ids):,} tokens: {windows}; "
            f"{amount(len(data.questions), 'cloze question')}",
        ]
        if task.reused:
            lines.append(f"kept from before: {', '.join(level.name for level in task.reused)}")
        self._told.update(task.failed)
        say(trainer, "\n".join([*lines, *failure_notes(task.failed)]))

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any, **named: Any) -> None:
        self._tell(trainer)

    def _tell(self, trainer: Trainer) -> None:
        """Prints a line for each level that was finished since the last call."""
        data, task = quantization_of(trainer)
        for level in [*task.done, *task.failed]:
            if level not in self._told and level not in task.reused:
                self._told.add(level)
                say(trainer, level_line(level, task.done, task.failed, data.context_lengths[0]))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt | Stopped):
            _, task = quantization_of(trainer)
            measured = f"{len(task.done)} of {len(task.levels) + 1} are measured and kept"
            say(trainer, f"stopped: {measured}; the same command continues from there")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell(trainer)
        data, task = quantization_of(trainer)
        results = LevelResults.of(task.done, task.failed, task.levels, data.context_lengths)
        directory, text = run_directory(trainer), data.text.path
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / "quantization.md", results.markdown(task.weights, text))
        write_parquet(directory / "quantization.parquet", results.flat_rows())
        write_json(directory / "summary.json", results.summary(task.weights, text, trainer.precision))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                if can_draw(trainer):
                    figure = frontier_figure([row.flat() for row in results.rows])
                    logger.experiment.add_figure("quantization/perplexity_by_size", figure, 0)
                for table in results.tables:
                    logger.experiment.add_text(f"quantization/{table.header[0]}", markdown_table(*table), 0)
        say(trainer, f"{results.text()}\nwritten to {directory}")


def quantization_of(trainer: Trainer) -> tuple[TextWindows, QuantizationEvaluation]:
    """Returns the run's data module and task.

    Raises:
        ValueError: the run is of another task.
    """
    problem = "QuantizationSummary reports on QuantizationEvaluation with TextWindows: remove it, or use both"
    data, task = data_of(trainer, TextWindows, problem), trainer.lightning_module
    if not isinstance(task, QuantizationEvaluation):
        raise ValueError(problem)
    return data, task
