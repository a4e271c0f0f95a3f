"""Academic benchmarks, asked and scored by the lm-evaluation-harness."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_danube.evaluation.academic_tasks import AcademicTask
from lightning_danube.evaluation.asking import AskedModel, Part, part_of
from lightning_danube.evaluation.results import Measured, columns_of, mean_of
from lightning_danube.inspection.shown import ShownExample, ShownSource, shown_tokens
from lightning_danube.terminal import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_danube.evaluation.harness import PreparedTask


@dataclass
class AcademicQuestions(Part):
    """The part of an evaluation that is one academic benchmark.

    Args:
        directory: directory of the benchmark's files, with the hub's layout; None for the hub itself.
        limit: most questions, chosen by the seed.
    """

    task: AcademicTask
    directory: Path | None
    limit: int | None
    seed: int
    prepared: PreparedTask | None = None
    missing: str | None = None
    """Reason why the questions are not available."""

    @property
    def title(self) -> str:
        return self.task.title

    def prepare(self) -> None:
        from lightning_danube.evaluation import harness

        try:
            self.prepared = harness.prepare_task(self.task, self.directory, self.limit, self.seed)
        except harness.MissingData as missing:
            self.missing = str(missing)

    def shown(self, examples: int, tokenizer: PreTrainedTokenizerBase) -> ShownSource:
        self.prepare()
        if self.prepared is None:
            return ShownSource(self.title, "questions", marks=None, warnings=[f"not asked: {self.missing}"])
        from lightning_danube.evaluation import harness

        asked = harness.asked_first(self.prepared, tokenizer) if examples else []
        number = self.prepared.documents
        shown = ShownSource(self.title, "questions", str(self.directory or ""), number, kept=number)
        scored = any(continuation for _, continuation in asked)
        shown.marks = "scored" if scored else None
        for choice, (context, continuation) in enumerate(asked, start=1):
            marked = [False] * len(context) + [True] * len(continuation)
            title = "first question" + (f", answer {choice}" if scored else "; the model writes the answer")
            shown.examples.append(ShownExample(title, shown_tokens(tokenizer, [*context, *continuation], marked)))
        shown.notes += [self.task.setting, *self.prepared.notes]
        shown.notes += part_of(self.prepared.documents, self.prepared.available)
        return shown

    def measure(self, model: AskedModel) -> list[Measured]:
        from lightning_danube.evaluation import harness

        task = self.task
        row = Measured("academic", task.name, task.title, task.setting)
        if task.chance is not None:
            row.more["guessing"] = task.chance
        if self.prepared is None:
            row.not_run = self.missing
            return [row]
        lm = harness.DecoderLM(
            model.decoder,
            model.tokenizer,
            batch_tokens=model.places,
            progress=lambda done, total: model.progress(task.title, done, total),
        )
        try:
            answered = harness.ask(lm, self.prepared, chat_template=model.chat_template)
        except harness.MissingData as missing:
            row.not_run = str(missing)
            return [row]
        key = task.metric if task.filter == "none" else f"{task.metric},{task.filter}"
        row.estimate = mean_of(answered.values[key])
        row.more |= {name: columns_of(mean_of(values)) for name, values in answered.values.items()}
        row.notes = [*self.prepared.notes, *part_of(row.estimate.n, self.prepared.available)]
        if model.chat_template:
            row.notes.append("asked in the chat template")
        if lm.truncated:
            row.notes.append(
                f"{counted(lm.truncated, 'prompt lost its', 'prompts lost their')} beginning, at "
                f"{lm.max_length:,} tokens"
            )
        row.records = [harness.record(sample) for sample in answered.samples]
        return [row]
