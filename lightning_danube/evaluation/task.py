"""Evaluation of a trained model: each batch is one part of the report, and `results` holds the measured rows."""

from __future__ import annotations

import time

from lightning.pytorch import LightningModule

from lightning_danube.evaluation.asking import HEAD_ROWS, AskedModel
from lightning_danube.evaluation.data import EvaluationData
from lightning_danube.evaluation.results import Measured
from lightning_danube.evaluation.settings import EvaluationSettings
from lightning_danube.generation.packing import pack_for_generation
from lightning_danube.model.forward_memory import forward_memory
from lightning_danube.terminal import tell
from lightning_danube.training.contract import data_of
from lightning_danube.weights.adapters import weights_digest
from lightning_danube.weights.loading import load_as_exported

NO_PARTS = (
    "Evaluation asks questions, {data} has none: set data.class_path to lightning_danube.evaluation.EvaluationData"
)


class Evaluation(LightningModule):
    """Asks a model the questions of `EvaluationData`, for the verb `test`. Runs on one device.

    Args:
        weights: the model: a run, a checkpoint, a Hugging Face directory, a GGUF file, a hub id or "smollm2".
        dtype: type of the parameters; if not given, the stored type (float32 for a quantized GGUF file).
        places: most places, padding included, of a batch of texts; a longer text is a separate batch.
        chat_template: ask academic questions as a user's messages in the tokenizer's chat template. The leaderboard of
            the paper's time did not use chat templates.

    Raises:
        ValueError: the weights cannot be read, or the tokenizer has no chat template.
    """

    def __init__(
        self,
        weights: str,
        dtype: str | None = EvaluationSettings.dtype,
        places: int = EvaluationSettings.places,
        chat_template: bool = EvaluationSettings.chat_template,
    ) -> None:
        super().__init__()
        EvaluationSettings(weights, dtype, places, chat_template)
        self.decoder, self.tokenizer = load_as_exported(weights, dtype=dtype)
        self.decoder.eval()
        self.config = self.decoder.config
        self.weights, self.places = weights, places
        self.asked = AskedModel(
            self.decoder,
            self.tokenizer,
            weights=weights,
            digest=weights_digest(self.decoder),
            places=places,
            chat_template=chat_template,
        )
        if chat_template and self.tokenizer.chat_template is None:
            raise ValueError(f"model.chat_template: the tokenizer of {weights} has none: leave it out")
        # No warning is needed: prompts that do not fit are cut and counted in the report.
        self.tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self.results: list[Measured] = []

    @property
    def _data(self) -> EvaluationData:
        return data_of(self.trainer, EvaluationData, NO_PARTS)

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1:
            raise ValueError("an evaluation runs on one device: set --trainer.devices 1")
        data = self._data
        if data.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"data.tokenizer has {data.vocab_size:,} tokens, the model of {self.weights} knows "
                f"{self.config.vocab_size:,}: give the tokenizer that belongs to it"
            )
        if (data.texts or data.needle) and data.context_length > self.config.max_position_embeddings:
            raise ValueError(
                f"data.context_length is {data.context_length:,}, the model of {self.weights} was made for "
                f"{self.config.max_position_embeddings:,}: lower it"
            )
        for part in data.parts:
            part.prepare()

    def on_test_start(self) -> None:
        # With packed weights a CPU reads prompts in less than two thirds of the time. Packed weights take only their
        # own dtype, so mixed precision keeps the weights unpacked.
        if not str(self.trainer.precision).endswith("mixed"):
            pack_for_generation(self.decoder, rows=self.places)
        if self.device.type == "cuda":
            tell(forward_memory(self.decoder, self.places, head_rows=HEAD_ROWS, cached=True))

    def test_step(self, batch: int, batch_idx: int) -> None:
        began = time.monotonic()
        rows = self._data.parts[batch].measure(self.asked)
        for row in rows:
            row.seconds = time.monotonic() - began
        self.results += rows
