"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290): a chat model learns which of two answers
people prefer, without a reward model.

The reference is the model before tuning. The reward of an answer is β times the answer's log-probability minus its
log-probability under the reference. The loss is -log σ(reward of the chosen answer - reward of the rejected answer).

Shapes: P pairs; 2 the chosen and the rejected answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lightning_danube.chat.settings import PreferenceTuningSettings
from lightning_danube.model import token_losses
from lightning_danube.model.config import ActivationCheckpointing
from lightning_danube.training.contract import HeldOutPairBatch, PairBatch, PairData, TokenBatch, data_of, places_of
from lightning_danube.training.optim import AdamW, LearningRate
from lightning_danube.training.tuning import TuningTask
from lightning_danube.weights.adapters import weights_digest
from lightning_danube.weights.lora import Lora

NO_PAIRS = (
    "PreferenceTuning learns from pairs, {data} has none: set data.class_path to lightning_danube.chat.PreferenceData"
)
REWARDS = ("chosen", "rejected", "margin", "accuracy")


class PreferenceTuning(TuningTask):
    """The loss of pairs, -log σ(reward of the chosen answer - reward of the rejected answer), as a mean over the pairs
    of the whole optimizer step.

    The reference's log-probabilities are computed once, before training, so no second model is kept. Besides the values
    that every task logs, this task logs `rewards/chosen`, `rewards/rejected`, `rewards/margin` and `rewards/accuracy`
    (share of pairs whose chosen answer has the higher reward; a tie counts half). After each validation it logs these
    values for each source's held-out pairs, and `ranking/accuracy_held_out_<source>`, the share of pairs whose chosen
    answer is likelier than the rejected answer.

    Args:
        beta: strength of the pull towards the reference; a smaller value lets the model change more.
        weights, learning_rate, lora, optimizer, activation_checkpointing: see `TuningTask`.

    Raises:
        ValueError: the weights cannot be read, beta is not above 0, or the optimizer is only for training from random
            weights.
    """

    def __init__(
        self,
        weights: str,
        learning_rate: LearningRate,
        beta: float = PreferenceTuningSettings.beta,
        lora: Lora | None = PreferenceTuningSettings.lora,
        optimizer: AdamW = PreferenceTuningSettings.optimizer,
        activation_checkpointing: ActivationCheckpointing = PreferenceTuningSettings.activation_checkpointing,
    ) -> None:
        super().__init__(
            PreferenceTuningSettings(
                weights,
                learning_rate,
                beta=beta,
                lora=lora,
                optimizer=optimizer,
                activation_checkpointing=activation_checkpointing,
            )
        )
        self.beta = beta
        self._sums = torch.zeros(len(REWARDS) + 1)
        """Sums of REWARDS over the pairs of the last batch, and the number of pairs."""
        self._ranked = torch.zeros(())
        self._step_sums: list[Tensor] = []
        self._step_rewards: Tensor | None = None

    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = data_of(self.trainer, PairData, NO_PAIRS)
        # No checkpoint is loaded yet, so these are the initial weights; a fresh adapter does not change the output.
        model = f"{weights_digest(self.decoder)}-{self.trainer.precision}"
        plugin, training = self.trainer.precision_plugin, self.training
        plugin.convert_module(self.to(self.trainer.strategy.root_device))
        self.eval()
        with torch.no_grad(), plugin.forward_context():
            data.prepare_reference(model, self._reference_log_probabilities)
        self.train(training)

    def _reference_log_probabilities(self, batch: TokenBatch) -> Tensor:
        return self.log_probabilities(
            {"input_ids": batch["input_ids"].to(self.device), "labels": batch["labels"].to(self.device)}
        )

    def log_probabilities(self, batch: TokenBatch) -> Tensor:
        """Returns the log-probabilities of the answers, each a sum over its tokens: (P, 2)."""
        nats_BT = token_losses(self.hidden_states(batch), self.decoder.lm_head.weight, batch["labels"])
        return -nats_BT.sum(1).view(-1, 2)

    def losses_of(self, batch: PairBatch | HeldOutPairBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Returns losses (P,), rewards (P, 2) and log-probabilities (P, 2)."""
        logps_P2 = self.log_probabilities(batch)
        rewards_P2 = self.beta * (logps_P2 - batch["reference"].to(logps_P2))
        return -logsigmoid(rewards_P2[:, 0] - rewards_P2[:, 1]), rewards_P2, logps_P2

    def sum_of_losses(self, batch: PairBatch | HeldOutPairBatch) -> tuple[Tensor, Tensor]:
        """Returns the sum of the losses over the pairs, and the number of pairs."""
        losses_P, rewards_P2, logps_P2 = self.losses_of(batch)
        # The last batches are padded with rows that hold no pair.
        there_P = (batch["labels"] >= 0).any(1).view(-1, 2)[:, 0]
        chosen_P, rejected_P = rewards_P2.detach().unbind(1)
        values_PR = torch.stack([chosen_P, rejected_P, chosen_P - rejected_P, won(rewards_P2), there_P.to(chosen_P)], 1)
        self._sums = (values_PR * there_P[:, None]).sum(0)
        self._ranked = (won(logps_P2) * there_P).sum()
        return (losses_P * there_P).sum(), there_P.sum()

    # --- training -----------------------------------------------------------------------------------------------------

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self._step_sums.append(self._sums)
        return loss

    def configure_gradient_clipping(self, *arguments: Any, **named: Any) -> None:
        super().configure_gradient_clipping(*arguments, **named)
        self._step_rewards = torch.stack(self._step_sums).sum(0)
        self._step_sums.clear()

    def more_of_the_step(self) -> dict[str, float]:
        assert self._step_rewards is not None
        *sums, pairs = self._mean_over_ranks(self._step_rewards).tolist()
        return {f"rewards/{name}": value / pairs for name, value in zip(REWARDS, sums, strict=True)}

    # --- evaluation ---------------------------------------------------------------------------------------------------

    def validation_step(self, batch: HeldOutPairBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx, dataloader_idx)
        if self.curve.is_brief:
            return  # rewards are those of all held-out pairs
        source, (*sums, pairs) = batch["source"], self._sums
        for name, total in zip(REWARDS, sums, strict=True):
            self.update_mean(f"rewards/{name}_held_out_{source}", total, pairs)
        self.update_mean(f"ranking/accuracy_held_out_{source}", self._ranked, pairs)

    def predict_step(self, batch: HeldOutPairBatch, batch_idx: int, dataloader_idx: int = 0) -> list[dict[str, Any]]:
        """Returns for each held-out pair its source, file, row, `id` if it has one, loss, rewards and texts."""
        losses_P, rewards_P2, _ = self.losses_of(batch)
        texts = self.texts_of(batch)  # the chosen answer of a pair, then the rejected one
        return [
            {
                **{"source": batch["source"], **place, "loss": loss, "chosen": chosen, "rejected": rejected},
                **{"chosen_text": texts[2 * number], "rejected_text": texts[2 * number + 1]},
            }
            for number, (place, loss, (chosen, rejected)) in enumerate(
                zip(places_of(batch), losses_P.tolist(), rewards_P2.tolist(), strict=True)
            )
            if batch["rows"][number] >= 0
        ]


def won(values_P2: Tensor) -> Tensor:
    """Returns 1 where the chosen answer's value is higher, 0 where it is lower, 0.5 where both are equal: (P,)."""
    return 0.5 + 0.5 * (values_P2[:, 0] - values_P2[:, 1]).detach().sign()
