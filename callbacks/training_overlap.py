"""Says of each academic benchmark whether its questions stood in the model's training texts."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_danube.evaluation.task import Evaluation
from lightning_danube.text.quality import NGRAM
from lightning_danube.tokens.overlap import TrainingTexts, overlap, training_texts
from lightning_danube.weights.names import locate


class TrainingOverlap(Callback):
    """Looks for the questions of academic benchmarks in the texts that a pre-training run of this project has read, by
    the run's own config and ledger; it stands before EvaluationReport. Of any other model it says that nobody knows.
    It reads all of these texts for each benchmark, which takes as long as reading takes.
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
            row.notes.append("whether the questions stood in the model's training texts is not known")
            return
        # A question may be read by several filters.
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
