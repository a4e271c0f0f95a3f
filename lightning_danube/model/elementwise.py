"""RMSNorm, SwiGLU's gate and rotary positions as one autograd function each: fewer passes over memory on a CPU.

PyTorch has no CPU kernel for these functions. It runs several operations, each of which reads and writes whole
activations. Here a piece of the rows goes through all operations while it is in the core's cache, and less memory is
kept for the backward pass. Compiled code and GPUs use the plain operations, which their compilers and kernels fuse.

Shapes: N rows, D channels; B batch, T tokens, H heads, K channels of a head. Rotary tables: (B or 1, T, 1, K).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PIECE = 2**16
"""Values per piece: 256 KiB in float32. Smaller pieces lose more time in calls than they gain from the cache."""


def gains(x: Tensor) -> bool:
    """Returns whether these functions are faster than plain operations: only in eager training on a CPU."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and torch.is_grad_enabled() and x.requires_grad


def pieces(rows: int, width: int) -> Iterator[slice]:
    step = max(1, PIECE // max(1, width))
    return (slice(start, start + step) for start in range(0, rows, step))


class RootMeanSquareNorm(torch.autograd.Function):
    """`F.rms_norm` in float32 or float64, with gains of the same type. Keeps the input and one value per row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        D = x.shape[-1]
        # FSDP2 warns of a module whose output is a view.
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        x_ND, y_ND = x.reshape(-1, D), y.view(-1, D)
        scale_N1 = x_ND.new_empty(len(x_ND), 1)
        for rows in pieces(*x_ND.shape):
            square_N1 = torch.linalg.vector_norm(x_ND[rows], dim=-1, keepdim=True).square_()
            torch.rsqrt(square_N1.div_(D).add_(eps), out=scale_N1[rows])
            torch.mul(x_ND[rows], scale_N1[rows], out=y_ND[rows]).mul_(weight_D)
        ctx.save_for_backward(x, weight_D, scale_N1)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, scale_N1 = ctx.saved_tensors
        D = x.shape[-1]
        x_ND, grad_ND = x.reshape(-1, D), grad.reshape(-1, D)
        grad_x_ND = torch.empty_like(x_ND)
        grad_weight_D = torch.zeros_like(weight_D) if ctx.needs_input_grad[1] else None
        for rows in pieces(*x_ND.shape):
            scale_n1 = scale_N1[rows]
            along_nD = grad_ND[rows] * x_ND[rows]
            if grad_weight_D is not None:
                grad_weight_D.addmv_(along_nD.t(), scale_n1.squeeze(1))
            # Subtract the part of the gradient that only changes the length of a row.
            length_n1 = torch.mv(along_nD, weight_D).unsqueeze(1).mul_(scale_n1).mul_(scale_n1).mul_(scale_n1)
            part_nD = torch.mul(grad_ND[rows], weight_D, out=grad_x_ND[rows]).mul_(scale_n1)
            part_nD.addcmul_(x_ND[rows], length_n1, value=-1 / D)
        return grad_x_ND.view(x.shape), grad_weight_D, None


class Gate(torch.autograd.Function):
    """silu(gate) * up. Keeps only its two inputs, and computes silu(gate) again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        gated = torch.empty_like(gate)
        gate_ND, up_ND, gated_ND = (x.view(-1, gate.shape[-1]) for x in (gate, up, gated))
        for rows in pieces(*gate_ND.shape):
            torch.ops.aten.silu.out(gate_ND[rows], out=gated_ND[rows]).mul_(up_ND[rows])
        return gated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
        gate_ND, up_ND, grad_ND, grad_gate_ND, grad_up_ND = (
            x.reshape(-1, gate.shape[-1]) for x in (gate, up, grad, grad_gate, grad_up)
        )
        for rows in pieces(*gate_ND.shape):
            torch.ops.aten.silu.out(gate_ND[rows], out=grad_up_ND[rows]).mul_(grad_ND[rows])
            before_silu_nD = grad_ND[rows] * up_ND[rows]
            torch.ops.aten.silu_backward.grad_input(before_silu_nD, gate_ND[rows], grad_input=grad_gate_ND[rows])
        return grad_gate, grad_up


class Turn(torch.autograd.Function):
    """Rotary positions: turns channels i and i + K/2 as one pair. The backward pass turns the gradient back."""

    @staticmethod
    def forward(ctx: Any, x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BT1K, sin_BT1K)
        return turn(x_BTHK, cos_BT1K, sin_BT1K)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTHK: Tensor) -> tuple[Tensor | None, ...]:
        cos_BT1K, sin_BT1K = ctx.saved_tensors
        return turn(grad_BTHK, cos_BT1K, -sin_BT1K), None, None


def turn(x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
    """Computes `rotate` of attention.py for float32 and float64, piece by piece."""
    B, T, H, K = x_BTHK.shape
    turned_BTHK = torch.empty_like(x_BTHK, memory_format=torch.contiguous_format)
    tables = (cos_BT1K.expand(B, T, 1, K), sin_BT1K.expand(B, T, 1, K))
    for row in range(B):
        for tokens in pieces(T, H * K):
            x_tHK, turned_tHK, cos_t1K, sin_t1K = (y[row, tokens] for y in (x_BTHK, turned_BTHK, *tables))
            torch.mul(x_tHK, cos_t1K, out=turned_tHK)
            for half, other in ((slice(K // 2), slice(K // 2, K)), (slice(K // 2, K), slice(K // 2))):
                turned_tHK[..., half].addcmul_(x_tHK[..., other], sin_t1K[..., half])
    return turned_BTHK
