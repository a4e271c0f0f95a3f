"""Muon: momentum whose matrices are orthogonalized (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

Shapes: N matrices of one shape, R rows, C columns, R <= C.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_danube.model.decoder import Block

from .adamw import AdamW
from .groups import parameter_groups

Coefficients = tuple[float, float, float]

QUINTICS: tuple[Coefficients, ...] = (
    (8.093369, -23.620430, 17.446152),
    (3.636586, -2.721927, 0.536546),
    (2.661300, -1.977155, 0.452616),
)
"""Coefficients (a, b, c) of a x + b x³ + c x⁵ for each iteration. The first polynomial is the closest to 1 on
[0.01, 1]; each next polynomial is the closest on the interval that the previous polynomial maps to (Polar Express,
Amsel et al. 2025, arXiv 2505.16932). Three iterations bring singular values from [0.01, 1] into [0.73, 1.27]."""


@dataclass(frozen=True)
class Muon(AdamW):
    """Muon for the matrices of the blocks, AdamW for all other parameters: embeddings, head and norms.

    Args:
        betas: decay rates of AdamW's moments.
        eps: added to the root of AdamW's second moment.
        weight_decay: weight decay of the matrices of the blocks, and of an untied head.
        peak: Muon's highest learning rate; `learning_rate.peak` is AdamW's. Both rates rise and fall together.
        momentum: decay rate of Muon's average of gradients.

    Raises:
        ValueError: a value is out of range.
    """

    peak: float = 0.02
    momentum: float = 0.95
    averages: ClassVar[tuple[int, int]] = (1, 2)
    orthogonalizes: ClassVar[bool] = True
    fine_tunes: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 < self.peak < float("inf"):
            raise ValueError(f"optimizer.peak is {self.peak}: give Muon's highest learning rate, such as 0.02")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optimizer.momentum is {self.momentum}: give a number from 0 to below 1, such as 0.95")

    def build(self, module: nn.Module, lr: float) -> MuonAndAdamW:
        """Returns the optimizer of all trainable parameters.

        Raises:
            ValueError: the matrices are sharded, or none of them is trainable.
        """
        matrices = matrices_of_blocks(module)
        if not matrices:
            raise ValueError("optimizer: Muon has no matrix of a block to train: use AdamW")
        rest = parameter_groups(module, self.weight_decay, without=matrices)
        muon = {"params": matrices, "lr": lr, "momentum": self.momentum, "weight_decay": self.weight_decay}
        return MuonAndAdamW(muon, rest, lr=lr, betas=self.betas, eps=self.eps)

    def peak_of(self, group: dict[str, Any], peak: float) -> float:
        """Returns the highest learning rate of a parameter group. `peak` is the highest rate of the schedule."""
        return self.peak if "momentum" in group else peak


def matrices_of_blocks(module: nn.Module) -> list[nn.Parameter]:
    """Returns the trainable matrices of the decoder's blocks.

    Raises:
        ValueError: the matrices are sharded.
    """
    blocks = [layer for layer in module.modules() if isinstance(layer, Block)]
    matrices = [p for block in blocks for p in block.parameters() if p.requires_grad and p.ndim == 2]
    if any(hasattr(parameter, "device_mesh") for parameter in matrices):
        raise ValueError(
            "optimizer: Muon needs whole matrices, and trainer.strategy shards them: use AdamW or another strategy"
        )
    return matrices


class MuonAndAdamW(torch.optim.Optimizer):
    """Trains the first parameter group with Muon, and the others with fused AdamW.

    `found_inf`: a scalar tensor. A step where it is 1 changes neither weights nor state, as with torch's fused AdamW.
    """

    found_inf: Tensor | None = None

    def __init__(
        self,
        muon: dict[str, Any],
        rest: Sequence[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
    ) -> None:
        # AdamW adds its defaults to the groups. This optimizer then has the same groups and the same state.
        self._adamw = torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, fused=True) if rest else None
        super().__init__([muon, *(self._adamw.param_groups if self._adamw else [])], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._muon_step(self.param_groups[0])
        if self._adamw is not None:
            self._adamw.param_groups, self._adamw.state = self.param_groups[1:], self.state
            self._adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
            self._adamw.step()
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        gradients = [weight.grad for weight in weights]
        momenta = [self._momentum_of(weight) for weight in weights]
        averages = torch._foreach_lerp(momenta, gradients, 1 - group["momentum"])
        # Nesterov: the average as it would be after one more step with this gradient.
        directions = orthogonalized(torch._foreach_lerp(averages, gradients, 1 - group["momentum"]))
        for weight, momentum, average, direction in zip(weights, momenta, averages, directions, strict=True):
            rate = group["lr"] * max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
            changed = (weight * (1 - group["lr"] * group["weight_decay"])).sub_(direction.to(weight.dtype), alpha=rate)
            self._assign(weight, changed)
            self._assign(momentum, average)

    def _momentum_of(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum: Tensor = state["momentum"]
        return momentum

    def _assign(self, old: Tensor, new: Tensor) -> None:
        old.copy_(new if self.found_inf is None else torch.where(self.found_inf.bool(), old, new))


def orthogonalized(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Returns for each matrix U S V^T a matrix near U V^T, in float32 or wider. Matrices of one shape form a batch."""
    places: dict[tuple[int, int], list[int]] = defaultdict(list)
    for place, matrix in enumerate(matrices):
        rows, columns = matrix.shape
        places[min(rows, columns), max(rows, columns)].append(place)
    results: list[Tensor] = [torch.empty(0)] * len(matrices)
    for together in places.values():
        wide = [
            matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
            for matrix in map(matrices.__getitem__, together)
        ]
        X_NRC = torch.stack([matrix.to(torch.promote_types(matrix.dtype, torch.float32)) for matrix in wide])
        for place, result in zip(together, newton_schulz(X_NRC), strict=True):
            results[place] = result if matrices[place].shape[0] <= matrices[place].shape[1] else result.mT
    return results


def newton_schulz(X_NRC: Tensor, quintics: Sequence[Coefficients] = QUINTICS) -> Tensor:
    """Returns matrices with the singular vectors of X and singular values near 1.

    Each iteration is X <- (a + b A + c A²) X with A = X X^T. All these polynomials of A commute. So the iterations
    use only the small matrix A, and X is multiplied once, at the end.
    """
    # The products below square the elements twice: scale them, so that they neither overflow nor vanish.
    X_NRC = X_NRC / X_NRC.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(X_NRC.dtype).tiny)
    A_NRR = X_NRC @ X_NRC.mT
    # The root of A's norm is an upper bound of the singular values of X, and closer than the norm of X.
    bound_N11 = torch.linalg.matrix_norm(A_NRR, keepdim=True).clamp_min(torch.finfo(X_NRC.dtype).tiny)
    A_NRR = A_NRR / bound_N11
    Q_NRR: Tensor | None = None
    for number, (a, b, c) in enumerate(quintics, start=1):
        B_NRR = torch.baddbmm(A_NRR, A_NRR, A_NRR, beta=b, alpha=c)
        B_NRR.diagonal(dim1=1, dim2=2).add_(a)
        Q_NRR = B_NRR if Q_NRR is None else B_NRR @ Q_NRR
        if number < len(quintics):
            A_NRR = B_NRR @ A_NRR @ B_NRR
    assert Q_NRR is not None
    return (Q_NRR / bound_N11.sqrt()) @ X_NRC
