"""Supervised fine-tuning for chat: a trained decoder learns the answers of conversations."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from lightning_danube.training.optim import AdamW, LearningRate
from lightning_danube.training.task import NextTokenTask
from lightning_danube.weights.adapters import Lora
from lightning_danube.weights.loading import load_decoder


class SupervisedFineTuning(NextTokenTask):
    """The loss of answers, as a mean over the answer tokens of the whole optimizer step.

    Args:
        weights: the model to begin with: a run, a checkpoint, a Hugging Face directory, a GGUF file, a hub id or
            "smollm2".
        learning_rate: schedule in tokens, counted as places of rows.
        lora: train an adapter on frozen weights instead of all weights.
        optimizer: AdamW's other settings.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.

    Raises:
        ValueError: the weights cannot be read.
    """

    def __init__(
        self,
        weights: str,
        learning_rate: LearningRate,
        lora: Lora | None = None,
        optimizer: AdamW = AdamW(weight_decay=0.0),  # noqa: B008  (frozen)
        activation_checkpointing: bool = False,
    ) -> None:
        if type(optimizer) is not AdamW:
            raise ValueError(
                f"model.optimizer is {type(optimizer).__name__}, which trains from random weights only: use AdamW"
            )
        # Master weights in float32: 16-bit ones would lose the small steps of fine-tuning.
        super().__init__(load_decoder(weights, dtype=torch.float32), learning_rate, optimizer)
        self.weights, self.lora = weights, lora
        self.decoder.activation_checkpointing = activation_checkpointing
        if lora is not None:
            lora.apply(self.decoder)
            # A checkpoint holds nothing of the frozen weights; what it must hold is checked when it is loaded.
            self.strict_loading = False

    def length_in_tokens(self) -> tuple[int, int]:
        # Rows are packed from the conversations, so their number is known only when the data are there.
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return data.batch_tokens, data.total_tokens

    def setup(self, stage: str) -> None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
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
        if stage == "fit":
            self.learning_rate.check(data.total_tokens)
            # A run on few conversations is shorter than the usual interval, and the trainer would warn of it.
            self.trainer.log_every_n_steps = min(self.trainer.log_every_n_steps, data.total_steps)  # type: ignore[attr-defined]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        if self.config.attention_dropout or (self.lora and self.lora.dropout):
            self.seed_dropout(batch_idx)
        total, _ = self.sum_of_losses(batch)
        # The trainer divides by the micro-batches of a step, the strategy by the replicas: undone here, since answers
        # are dealt unevenly to both.
        parts = self.trainer.accumulate_grad_batches * self._replicas()
        loss = total * (parts / max(1, batch["step_labels"]))
        self._losses.append(loss.detach())
        return loss

    def _replicas(self) -> int:
        return int((self.trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"])

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["base_weights"] = self.weights
        if self.lora is not None:
            checkpoint["lora"] = asdict(self.lora)
            checkpoint["state_dict"] = {name: checkpoint["state_dict"][name] for name in self._trained()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        mine, saved = (None if self.lora is None else asdict(self.lora)), checkpoint.get("lora")
        if saved != mine:
            raise ValueError(
                f"the checkpoint was trained with lora {saved}, the config has {mine}: set it back, or begin a new run "
                "without --ckpt_path"
            )
        super().on_load_checkpoint(checkpoint)
        if self.lora is not None and checkpoint["state_dict"].keys() != self._trained():
            raise ValueError("the checkpoint holds another adapter than the config describes: begin a new run")

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}
