"""The task that all fine-tuning tasks extend: trained weights, an optional adapter, steps with uneven label counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_danube.terminal import amount, tell
from lightning_danube.training.contract import TokenizedData, data_of
from lightning_danube.training.optim.tuning import TuningSettings
from lightning_danube.training.planned_data import PlannedData
from lightning_danube.training.position import limit_log_interval, replicas_of
from lightning_danube.training.task import DecoderTask
from lightning_danube.weights.loading import load_decoder

FEW_STEPS = 5
"""A shorter run is said to be short, because its model has hardly changed."""


class TuningTask(DecoderTask):
    """A trained decoder that is trained further.

    A subclass defines `sum_of_losses`: the sum over the counted items of a micro-batch (tokens, pairs, texts), and the
    number of items. The loss of an optimizer step is the mean over all its counted items, even if they are spread
    unevenly over micro-batches and devices. `step_labels` of each batch is the number of items in the whole step.

    The settings of every fine-tuning task have these fields; a task may add its own.

    Args:
        weights: initial weights from a run, a checkpoint, a Hugging Face directory, a GGUF file, a hub id or "smollm2".
        learning_rate: schedule in tokens.
        lora: train an adapter on frozen weights instead of all weights.
        optimizer: AdamW's other settings.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations;
            "selective" keeps the results of the attention kernels and recomputes the rest.

    Raises:
        ValueError: the weights cannot be read.
    """

    has_loss_curve = True

    def __init__(self, settings: TuningSettings) -> None:
        # Master weights in float32: 16-bit weights would round away the small steps of fine-tuning.
        decoder = load_decoder(settings.weights, dtype=torch.float32)
        super().__init__(
            decoder, settings.learning_rate, settings.optimizer, weights=settings.weights, lora=settings.lora
        )
        self.decoder.activation_checkpointing = settings.activation_checkpointing

    def setup(self, stage: str) -> None:
        """Checks the data against the model, and the learning rate against the length of the run.

        Raises:
            ValueError: the data do not fit the model, or the learning rate does not fit the length of the run.
        """
        data = data_of(self.trainer, TokenizedData, "{data} has no vocab_size and context_length to compare")
        if data.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"data.tokenizer has {data.vocab_size:,} tokens, the model of {self.weights} knows "
                f"{self.config.vocab_size:,}: give the tokenizer that belongs to it"
            )
        if data.context_length > self.config.max_position_embeddings:
            raise ValueError(
                f"data.context_length is {data.context_length:,}, the model of {self.weights} was made for "
                f"{self.config.max_position_embeddings:,}: lower it"
            )
        super().setup(stage)
        if stage == "fit":
            self.learning_rate.check(self.training_data.total_tokens)
            total = self.training_data.total_steps
            limit_log_interval(self.trainer, total)
            if total < FEW_STEPS and self.trainer.is_global_zero:
                tell(
                    f"the run has only {amount(total, 'optimizer step')}: more epochs (data.epochs) or fewer examples "
                    "per step train more"
                )

    def check_ahead(self, data: object) -> None:
        """Checks the learning rate before the data are prepared, where their options limit the length of the run.

        Raises:
            ValueError: the learning rate does not fit even the longest run.
        """
        if isinstance(data, PlannedData) and (most := data.most_tokens()) is not None:
            self.learning_rate.check(most, is_limit=True)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.has_dropout:
            self.seed_dropout(batch_idx)
        total, _ = self.sum_of_losses(batch)
        # The trainer divides by the micro-batches of a step, and the strategy by the replicas. This undoes both.
        replicas, _ = replicas_of(self.trainer)
        loss = total * (self.trainer.accumulate_grad_batches * replicas / max(1, batch["step_labels"]))
        self._losses.append(loss.detach())
        return loss
