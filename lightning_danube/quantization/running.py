"""What every model that is measured offers, whoever runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Content:
    """What a model holds.

    Args:
        tensor_bytes: of all tensors; of a GGUF file those of the file, which is little more.
        weights: parameters of the model, a tied matrix once.
        fallbacks: type → how many matrices have it because the level's own does not fit their shape.
    """

    tensor_bytes: int
    weights: int
    fallbacks: Mapping[str, int]

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.tensor_bytes / self.weights


class RunningModel(Protocol):
    """A model that answers with logits."""

    content: Content

    def logits(self, ids_BT: Tensor, first: int) -> Tensor:
        """(B, T - first, V), at the places from `first` on."""

    def close(self) -> None:
        """Gives back what it holds outside of Python's memory."""
