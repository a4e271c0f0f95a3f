"""Reports for each academic benchmark whether its questions were in the model's training texts."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_danube.evaluation.task import Evaluation
from lightning_danube.text.quality import NGRAM
from lightning_danube.tokens.overlap import TrainingTexts, overlap, training_texts
from lightning_danube.weights.names import locate


class TrainingOverlap(Callback):
    """Looks for the questions of academic benchmarks in the texts that a pre-training run of this project has read.

    Name it before EvaluationReport. The run's config and ledger say which texts those are. For any other model, the
    note says that this is not known. Each benchmark reads all of the texts, so the time grows with their size.
    """

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Evaluation)
        located = locate(pl_module.weights)
        self.texts: TrainingTexts | None = None
        if located.kind == "checkpoint":
            self.texts = training_texts(located.path.parent.parent)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        assert isinstance(pl_module, Evaluation)
        row = pl_module.results[-1]
        if row.table != "academic" or row.estimate is None:
            return
        if self.texts is None:
            row.notes.append("it is not known whether the questions were in the model's training texts")
            return
        # Several filters may read the same question.
        asked = {(record["task"], record["document"]): record["row"] for record in row.records}
        found = overlap(list(asked.values()), self.texts)
        row.more["in_training_texts"] = {
            "found": len(found.found),
            "looked_for": found.looked_for,
            "sources_not_read": found.not_read,
        }
        note = (
            f"{len(found.found):,} of {found.looked_for:,} questions share {NGRAM} words in a row, or all they have, "
            "with the run's training texts"
        )
        if found.not_read:
            note += f" (not looked through: {', '.join(found.not_read)})"
        row.notes.append(note)
