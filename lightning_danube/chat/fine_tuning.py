"""Supervised fine-tuning for chat: a trained decoder learns the answers of conversations."""

from __future__ import annotations

from lightning_danube.model.config import ActivationCheckpointing
from lightning_danube.training.optim import AdamW, LearningRate
from lightning_danube.training.tuning import TuningTask
from lightning_danube.weights.lora import Lora


class SupervisedFineTuning(TuningTask):
    """The cross-entropy of the answers, as a mean over the answer tokens of the whole optimizer step.

    Args:
        weights: the model to begin with: a run, a checkpoint, a Hugging Face directory, a GGUF file, a hub id or
            "smollm2".
        learning_rate: schedule in tokens, counted as places of rows.
        lora: train an adapter on the frozen weights, instead of training all weights.
        optimizer: AdamW's other settings.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations;
            "selective" keeps the results of the attention kernels and recomputes the rest.

    Raises:
        ValueError: the weights cannot be read.
    """

    def __init__(
        self,
        weights: str,
        learning_rate: LearningRate,
        lora: Lora | None = None,
        optimizer: AdamW = AdamW(weight_decay=0.0),  # noqa: B008  (frozen)
        activation_checkpointing: ActivationCheckpointing = False,
    ) -> None:
        super().__init__(weights, learning_rate, lora, optimizer, activation_checkpointing)
