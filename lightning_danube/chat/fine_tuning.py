"""Supervised fine-tuning for chat: a trained decoder learns the answers of conversations."""

from __future__ import annotations

from lightning_danube.model.config import ActivationCheckpointing
from lightning_danube.training.optim import AdamW, LearningRate
from lightning_danube.training.optim.tuning import TuningSettings
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
        ValueError: the weights cannot be read, or the optimizer is only for training from random weights.
    """

    def __init__(
        self,
        weights: str,
        learning_rate: LearningRate,
        lora: Lora | None = TuningSettings.lora,
        optimizer: AdamW = TuningSettings.optimizer,
        activation_checkpointing: ActivationCheckpointing = TuningSettings.activation_checkpointing,
    ) -> None:
        super().__init__(
            TuningSettings(
                weights,
                learning_rate,
                lora=lora,
                optimizer=optimizer,
                activation_checkpointing=activation_checkpointing,
            )
        )
