"""AdamW, the optimizer of every task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class AdamW:
    """AdamW as the H2O-Danube-1.8B report states it (arXiv 2401.16818). The values of Danube3 are not published.

    Args:
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: weight decay of the matrices. Embeddings, norms and biases do not decay.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    averages: ClassVar[tuple[int, int]] = (2, 2)
    """Values that the optimizer keeps for each weight: of the blocks' matrices, and of all other parameters. For
    `plan`, not an option."""
    orthogonalizes: ClassVar[bool] = False
    """Whether the steps of the blocks' matrices are made orthogonal, with tensors and products that `plan` counts."""
    fine_tunes: ClassVar[bool] = True
    """Whether the optimizer can train weights that another optimizer has trained. Not an option."""

    def build(self, module: nn.Module, lr: float) -> torch.optim.Optimizer:
        """Returns the optimizer of all trainable parameters, with the fused kernel."""
        import torch

        from .groups import parameter_groups

        return torch.optim.AdamW(
            parameter_groups(module, self.weight_decay), lr=lr, betas=self.betas, eps=self.eps, fused=True
        )

    def peak_of(self, group: dict[str, Any], peak: float) -> float:
        """Returns the highest learning rate of a parameter group. `peak` is the highest rate of the schedule."""
        return peak
