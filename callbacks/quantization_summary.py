"""What bits cost: a table of all levels in the terminal, as Markdown, parquet and in TensorBoard, and what to take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_danube.callbacks.progress import can_draw, say
from lightning_danube.files import write_json, write_parquet, write_text
from lightning_danube.intervals import Estimate
from lightning_danube.quantization.frontier import frontier_figure
from lightning_danube.quantization.levels import FULL, Level
from lightning_danube.quantization.report import MIB, Row, percent, recommendation, rows_of
from lightning_danube.quantization.task import QuantizationEvaluation
from lightning_danube.quantization.text_windows import TextWindows
from lightning_danube.signals import Stopped
from lightning_danube.terminal import Table, markdown_table, text_table
from lightning_danube.training.position import run_directory

NOISE = "≈"


class QuantizationSummary(Callback):
    """Prints a line when a level is measured and a table when all are; writes `quantization.md`,
    `quantization.parquet` and `summary.json` into the run's directory, and a figure for TensorBoard."""

    def __init__(self) -> None:
        self._told: set[Level] = set()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data, task = quantization_of(trainer)
        windows = ", ".join(f"{len(data.windows(length)):,} windows of {length:,}" for length in data.context_lengths)
        lines = [
            f"model: {task.config.parameters:,} parameters, {task.weights}",
            f"text: {data.text.path}, {len(data.ids):,} tokens: {windows}; {len(data.questions):,} cloze questions",
        ]
        if task.reused:
            lines.append(f"kept from before: {', '.join(level.name for level in task.reused)}")
        lines += failure_notes(task)
        self._told.update(task.failed)
        say(trainer, "\n".join(lines))

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *arguments: Any, **named: Any) -> None:
        self._tell(trainer)

    def _tell(self, trainer: Trainer) -> None:
        """A line for each level that is finished."""
        data, task = quantization_of(trainer)
        for level in [*task.done, *task.failed]:
            if level in self._told or level in task.reused:
                continue
            self._told.add(level)
            if level in task.failed:
                say(trainer, f"  {level.name}: not measured: {task.failed[level]}")
                continue
            row = rows_of(task.done, [] if level == FULL else [level], data.context_lengths[0])[-1]
            change = "" if level == FULL else f" ({percent(row.change)})"
            say(
                trainer,
                f"  {level.name}: {row.measured.content.bits_per_weight:.2f} bits a weight, perplexity "
                f"{row.perplexity.value:.3f}{change}, {row.measured.seconds:.0f} s",
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt | Stopped):
            _, task = quantization_of(trainer)
            wanted = len(task.levels) + 1
            say(
                trainer,
                f"stopped: {len(task.done)} of {wanted} are measured and kept; the same command goes on from there",
            )

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell(trainer)
        data, task = quantization_of(trainer)
        rows = rows_of(task.done, task.levels, data.context_lengths[0])
        failed = {level.name: task.failed[level] for level in task.levels if level in task.failed}
        advice = recommendation(rows)
        blocks = [main_table(rows)]
        if len(data.context_lengths) > 1:
            blocks.append(length_table(rows))
        if any(row.measured.cost for row in rows):
            blocks.append(cost_table(rows))
        notes = [*failure_notes(task), *fallback_notes(rows)]
        notes += [f"{row.level.name}: {row.measured.cost_reason}" for row in rows if row.measured.cost_reason]
        told = ["", *(text_table(*block) + "\n" for block in blocks), table_legend(rows), *notes, "", *advice]
        directory = run_directory(trainer)
        directory.mkdir(parents=True, exist_ok=True)
        write_markdown(directory / "quantization.md", task, data, blocks, [table_legend(rows), *notes], advice)
        write_parquet(directory / "quantization.parquet", flat_rows(rows, failed))
        write_json(
            directory / "summary.json",
            {
                "weights": task.weights,
                "precision": trainer.precision,
                "text": data.text.path,
                "levels": [row.flat() for row in rows],
                "not_measured": failed,
                "recommendation": advice,
            },
        )
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                if can_draw(trainer):
                    figure = frontier_figure([row.flat() for row in rows])
                    logger.experiment.add_figure("quantization/perplexity_by_size", figure, 0)
                for header, body in blocks:
                    logger.experiment.add_text(f"quantization/{header[0]}", markdown_table(header, body), 0)
        say(trainer, "\n".join([*told, f"written to {directory}"]))


def quantization_of(trainer: Trainer) -> tuple[TextWindows, QuantizationEvaluation]:
    """
    Raises:
        ValueError: the run is of another task.
    """
    data, task = trainer.datamodule, trainer.lightning_module  # type: ignore[attr-defined]
    if not isinstance(data, TextWindows) or not isinstance(task, QuantizationEvaluation):
        raise ValueError(
            "QuantizationSummary reports on QuantizationEvaluation with TextWindows: remove it, or use both"
        )
    return data, task


def main_table(rows: Sequence[Row]) -> Table:
    header = ["level", "MiB", "bits", "perplexity", "change", "KL, nats", "KL, 99 %", "same first", "cloze"]
    body = []
    for row in rows:
        full = row.level == FULL
        content = row.measured.content
        cloze = "" if row.cloze is None else share(row.cloze)
        if not full and row.cloze_change is not None:
            cloze += f" {100 * row.cloze_change.value:+.0f}{noise(row.cloze_change)}"
        body.append(
            [
                row.level.name,
                f"{content.tensor_bytes / MIB:,.1f}",
                f"{content.bits_per_weight:.2f}",
                with_half(row.perplexity),
                "" if full else percent(row.change) + noise(row.change),
                "" if full else f"{row.divergence.value:.1e}",
                "" if full else f"{row.divergence_99:.1e}",
                "" if full else share(row.same_first),
                cloze,
            ]
        )
    return header, body


def length_table(rows: Sequence[Row]) -> Table:
    lengths = list(rows[0].by_length)
    header = ["perplexity by context", *(f"{length:,}" for length in lengths)]
    body = []
    for row in rows:
        cells = []
        for length in lengths:
            value, change = row.by_length[length]
            shown = "" if row.level == FULL else f" {percent(change, with_interval=False)}{noise(change)}"
            cells.append(f"{value.value:.3f}{shown}")
        body.append([row.level.name, *cells])
    return header, body


def cost_table(rows: Sequence[Row]) -> Table:
    header = ["speed and memory", "prefill, tokens/s", "decode, tokens/s", "peak memory, MiB"]
    body = []
    for row in rows:
        cost = row.measured.cost
        if cost is None:
            body.append([row.level.name, "–", "–", "–"])
            continue
        peak = "–" if cost.peak_memory_bytes is None else f"{cost.peak_memory_bytes / MIB:,.0f}"
        prefill, decode = cost.prefill_tokens_per_second, cost.decode_tokens_per_second
        body.append([row.level.name, f"{prefill:,.0f}", f"{decode:,.1f}", peak])
    return header, body


def table_legend(rows: Sequence[Row]) -> str:
    first = rows[0].flat()
    text = (
        f"{first['tokens']:,} tokens in {first['windows']:,} windows count; intervals: 95 %, over windows; change: "
        f"against the full model, paired; {NOISE}: zero lies inside the interval"
    )
    if first["divergence_tokens"] < first["tokens"]:
        text += f"; KL and same first: on the first {first['divergence_tokens']:,} tokens"
    return text


def flat_rows(rows: Sequence[Row], failed: dict[str, str]) -> list[dict[str, Any]]:
    """A row for each level, measured or not."""
    values = [row.flat() | {"not_measured": None} for row in rows]
    return values + [dict.fromkeys(values[0]) | {"level": name, "not_measured": why} for name, why in failed.items()]


def failure_notes(task: QuantizationEvaluation) -> list[str]:
    """A line for each reason."""
    levels: dict[str, list[str]] = {}
    for level, reason in task.failed.items():
        levels.setdefault(reason, []).append(level.name)
    return [f"{', '.join(names)}: not measured: {reason}" for reason, names in levels.items()]


def fallback_notes(rows: Sequence[Row]) -> list[str]:
    return [
        f"{row.level.name}: {flat['fallbacks']} tensors have rows that the type cannot hold: {flat['fallback_types']}"
        for row in rows
        if (flat := row.flat())["fallbacks"]
    ]


def noise(change: Estimate) -> str:
    return NOISE if change.is_noise else " "


def with_half(estimate: Estimate) -> str:
    return f"{estimate.value:.3f}" + ("" if estimate.half is None else f" ± {estimate.half:.3f}")


def share(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} %"


def write_markdown(
    path: Path,
    task: QuantizationEvaluation,
    data: TextWindows,
    blocks: Sequence[Table],
    notes: Sequence[str],
    advice: Sequence[str],
) -> None:
    parts = [f"# {task.weights} in fewer bits, on {data.text.path}"]
    parts += [markdown_table(*block) for block in blocks]
    parts += ["\n".join(f"- {note}" for note in notes), "\n".join(f"- {line}" for line in advice)]
    write_text(path, "\n\n".join(part for part in parts if part) + "\n")
