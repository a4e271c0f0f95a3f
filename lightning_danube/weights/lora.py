"""The options of a LoRA adapter, without PyTorch: `plan` reads them, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning_danube.model.architecture import ADAPTABLE

if TYPE_CHECKING:
    from lightning_danube.model import Decoder


@dataclass(frozen=True)
class Lora:
    """A low-rank adapter (Hu et al. 2021, arXiv 2106.09685); the defaults are the paper's settings for classification.

    Args:
        rank: rank of each layer's update.
        alpha: the update is scaled by alpha / rank.
        dropout: dropout rate on the adapter's input, in training.
        targets: the blocks' linear layers that get an adapter.
        dora: also learn the norm of each weight row, separate from its direction (Liu et al. 2024, arXiv 2402.09353).
        rslora: scale by alpha / √rank, so that a higher rank does not weaken the update (Kalajdzievski 2023,
            arXiv 2312.03732).
        quantization: "nf4" holds the frozen weights of the blocks' linear layers in 4 bits (QLoRA, arXiv 2305.14314).
    """

    rank: int = 16
    alpha: float = 32
    dropout: float = 0.05
    targets: tuple[str, ...] = ADAPTABLE
    dora: bool = False
    rslora: bool = False
    quantization: Literal["nf4"] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError(
                f"lora has rank {self.rank}, alpha {self.alpha}, dropout {self.dropout}: rank at least 1, alpha above "
                "0, dropout from 0 to below 1"
            )
        unknown = sorted(set(self.targets) - set(ADAPTABLE))
        if unknown or not self.targets:
            known = ", ".join(ADAPTABLE)
            raise ValueError(f"lora.targets names {', '.join(unknown) or 'nothing'}: the layers are {known}")

    def apply(self, decoder: Decoder) -> None:
        """Adds a new adapter to a decoder, in place, after quantizing the weights if that is configured.

        Raises:
            ValueError: the decoder already has an adapter.
        """
        from lightning_danube.weights.adapters import add_adapter

        if self.quantization is not None:
            from lightning_danube.weights.quantized_linear import quantize_linear_layers

            quantize_linear_layers(decoder, self.quantization)
        add_adapter(decoder, **self.settings())

    def settings(self) -> dict[str, Any]:
        """Returns these settings as arguments of peft.LoraConfig."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": list(self.targets),
            "use_dora": self.dora,
            "use_rslora": self.rslora,
        }
