"""The settings that all fine-tuning tasks share. They need neither Lightning nor PyTorch."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

from lightning_danube.model.config import ActivationCheckpointing
from lightning_danube.options import options
from lightning_danube.weights.lora import Lora

from .adamw import AdamW
from .schedule import LearningRate


@dataclass(frozen=True)
class TuningSettings:
    """The arguments of a fine-tuning task and their defaults. `TuningTask` explains the arguments.

    Raises:
        ValueError: the optimizer is only for training from random weights.
    """

    weights: str
    learning_rate: LearningRate
    _: KW_ONLY
    lora: Lora | None = None
    optimizer: AdamW = AdamW(weight_decay=0.0)  # noqa: RUF009  (frozen)
    activation_checkpointing: ActivationCheckpointing = False

    def __post_init__(self) -> None:
        optimizer = options(AdamW, self.optimizer, "model.optimizer")
        if not optimizer.fine_tunes:
            raise not_for_tuning(type(optimizer).__name__)
        object.__setattr__(self, "optimizer", optimizer)


def not_for_tuning(optimizer: str) -> ValueError:
    """Returns the error for an optimizer with this name that cannot train weights that another one has trained."""
    return ValueError(f"model.optimizer is {optimizer}, which trains from random weights only: use AdamW")
