"""Linear layers quantized by hqq: groups of a row's weights share a scale and a zero point. Only this file imports hqq.

hqq (Half-Quadratic Quantization, Badri and Shaji 2023) rounds to the nearest step, then moves the zero points to make
the error sparse. Without that second step it is plain rounding with equal size: the baseline for every method.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_danube.terminal import amount

SCALE_DTYPE = torch.float16
"""Type of scales and zero points, as hqq keeps them on a GPU."""


class GroupedLinear(nn.Module):
    """A linear layer whose weights are packed in 2, 3, 4 or 8 bits and unpacked in each call.

    Args:
        weight_ND: the matrix to quantize, one row per output.
        bits: bits/weight. Ten 3-bit weights are packed into 32 bits, so each takes 3.2.
        group: number of neighbouring weights in a row that share a scale and a zero point.
        optimize: hqq's optimization of the zero points; without it plain rounding.
        bias_N: the bias, which is not quantized.

    Raises:
        ValueError: all weights of a group are equal, so they have no range to divide.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor
    bias_N: Tensor | None

    def __init__(
        self, weight_ND: Tensor, bits: int, group: int, *, optimize: bool, bias_N: Tensor | None = None
    ) -> None:
        super().__init__()
        from hqq.core.quantize import Quantizer

        groups_GS = weight_ND.detach().float().reshape(-1, group)
        if flat := int((groups_GS.amax(1) == groups_GS.amin(1)).sum()):
            raise ValueError(
                f"in {amount(flat, 'group')} of {group} weights all weights are equal: there is no range to "
                "divide into steps"
            )
        packed, meta = Quantizer.quantize(
            weight_ND.detach(),
            nbits=bits,
            group_size=group,
            optimize=optimize,
            axis=1,
            device=str(weight_ND.device),
        )
        self.register_buffer("packed", packed)
        self.register_buffer("scale", meta.pop("scale").to(SCALE_DTYPE))
        self.register_buffer("zero", meta.pop("zero").to(SCALE_DTYPE))
        self.register_buffer("bias_N", None if bias_N is None else bias_N.detach())
        self.meta: dict[str, Any] = meta

    def weight_values(self, dtype: torch.dtype) -> Tensor:
        """Returns the dequantized weights, (N, D)."""
        from hqq.core.quantize import Quantizer

        meta = self.meta | {"scale": self.scale.to(dtype), "zero": self.zero.to(dtype), "compute_dtype": dtype}
        values: Tensor = Quantizer.dequantize(self.packed, meta)
        return values

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias_N = None if self.bias_N is None else self.bias_N.to(x.dtype)
        return F.linear(x, self.weight_values(x.dtype), bias_N)
