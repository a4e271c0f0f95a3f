"""Evaluation of a trained model: each batch is a part of the report, and `results` is what came of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule

from lightning_danube.tasks.evaluation_results import Measured, mean_of
from lightning_danube.weights import load_as_exported


class Evaluation(LightningModule):
    """Asks a model the questions of `EvaluationData`; for the verb `test`. It runs on one device.

    Args:
        weights: the model: a run, a checkpoint, a Hugging Face directory, a GGUF file, a hub id or "smollm2".
        dtype: type of its parameters, as stored if not given (of a quantized GGUF file float32).
        places: most places, padding included, of a batch of texts; a longer text is a batch of its own.
        chat_template: put academic questions as a user's messages, in the tokenizer's chat template. The leaderboard
            of the paper's time did not.

    Raises:
        ValueError: the weights cannot be read, or there is no such template.
    """

    def __init__(self, weights: str, dtype: str | None = None, places: int = 8192, chat_template: bool = False) -> None:
        super().__init__()
        if places < 1:
            raise ValueError(f"model.places is {places}: it must be at least 1")
        self.decoder, self.tokenizer = load_as_exported(weights, dtype=dtype)
        self.decoder.eval()
        self.config = self.decoder.config
        self.weights, self.places, self.chat_template = weights, places, chat_template
        if chat_template and self.tokenizer.chat_template is None:
            raise ValueError(f"model.chat_template: the tokenizer of {weights} has none: leave it out")
        self.results: list[Measured] = []
        self.on_progress: Callable[[str, int, int], None] | None = None
        """Called with a part's title, and how much of it is done."""
        self._prepared: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            raise ValueError("an evaluation runs on one device: set --trainer.devices 1")
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if data.tasks:
            from lightning_danube import harness

            # All questions are read before the first is asked: a bad row is told at once.
            for task in data.tasks:
                try:
                    self._prepared[task.name] = harness.prepare(task, data.directory, data.limit, data.seed)
                except harness.MissingData as missing:
                    self._prepared[task.name] = missing

    def test_step(self, batch: Any, batch_idx: int) -> None:
        began = time.monotonic()
        for measured in self._measure(batch):
            measured.seconds = time.monotonic() - began
            self.results.append(measured)

    def _measure(self, part: Any) -> list[Measured]:
        return [self._academic(part)]

    def _progress(self, title: str, done: int, total: int) -> None:
        if self.on_progress is not None:
            self.on_progress(title, done, total)

    # --- academic benchmarks ------------------------------------------------------------------------------------------

    def _academic(self, task: Any) -> Measured:
        from lightning_danube import harness

        row = Measured("academic", task.name, task.title, task.setting)
        prepared = self._prepared[task.name]
        if isinstance(prepared, harness.MissingData):
            row.not_run = str(prepared)
            return row
        lm = harness.DecoderLM(
            self.decoder,
            self.tokenizer,
            batch_tokens=self.places,
            progress=lambda done, total: self._progress(task.title, done, total),
        )
        try:
            answered = harness.run(lm, prepared, chat_template=self.chat_template)
        except harness.MissingData as missing:
            row.not_run = str(missing)
            return row
        key = task.metric if task.filter == "none" else f"{task.metric},{task.filter}"
        row.estimate = mean_of(answered.values[key])
        row.more = {name: mean_of(values)._asdict() for name, values in answered.values.items()}
        row.notes = list(prepared.notes)
        of = prepared.available
        if row.estimate.n < of:
            row.notes.append(f"{row.estimate.n:,} of {of:,} questions, chosen by seed")
        if lm.truncated:
            row.notes.append(f"{lm.truncated:,} prompts lost their beginning, at {lm.max_length:,} tokens")
        row.records = [harness.record(sample) for sample in answered.samples]
        return row
