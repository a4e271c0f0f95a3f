"""Attention by batched matrix products, a block of queries at a time: faster on a CPU than PyTorch's fused kernel.

The kernel behind `F.scaled_dot_product_attention` multiplies small tiles; oneDNN's batched products of whole blocks run
near the processor's peak. As in the kernel, memory holds the scores of one block at a time, and the backward pass
computes them again.

Scores have the type of the queries. In 16 bits, the largest score of a row is subtracted *before* rounding: oneDNN adds
its negative to the product in float32. The scores that matter in the softmax are then near zero, where 16 bits are
precise enough. Rounding the scores themselves would make the error 4 to 6 times as large at scores of +-10.

Shapes: B batch, T tokens, H query heads, G key-value heads (G divides H), R = H / G query heads of a group, K channels
of a head, Q queries of a block, S keys that a block may see, N = B * G.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..device import onednn_multiplies, onednn_multiplies_float32

_P = ParamSpec("_P")
_R = TypeVar("_R")

# One core of an EPYC with AVX-512, 6 heads on 2 of 64 channels, bfloat16, ms of forward + backward:
#
#     rows x tokens            8 x 512    2 x 2048    1 x 4096
#     fused kernel                 119         268         459
#     64 queries a block            52         172         357
#     128                           56         163         320
#     256                           66         168         297
BLOCK_QUERIES = 64
BLOCK_SCORES = 2**21
"""Largest number of scores in a block of several batch rows: 4 MB in 16 bits."""
WIDE_TOKENS = 1024
"""Longest float32 text for blocks. Blocks take 68 ms and the kernel 112 ms at 512 tokens, 212 and 207 ms at 2048."""


def is_faster(q_BHTK: Tensor) -> bool:
    """Returns whether blocked attention is faster than the kernel on this processor.

    bfloat16 needs the processor's own instructions, float32 needs permission to use oneDNN
    (`torch.set_float32_matmul_precision`). With PyTorch's default BLAS neither way is faster in float32.
    """
    if q_BHTK.device.type != "cpu":
        return False
    if q_BHTK.dtype == torch.bfloat16:
        return onednn_multiplies(torch.bfloat16)
    return q_BHTK.dtype == torch.float32 and q_BHTK.shape[2] <= WIDE_TOKENS and onednn_multiplies_float32()


def outside_compiled_code(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Applies `torch.compiler.disable` at the first call, because it imports PyTorch's compiler (1.4 CPU seconds)."""
    disabled: list[Callable[_P, _R]] = []

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not disabled:
            disabled.append(torch.compiler.disable(function))
        return disabled[0](*args, **kwargs)

    return call


@outside_compiled_code
def blocked_attention(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask_B1TT: Tensor | None = None) -> Tensor:
    """Returns causal `F.scaled_dot_product_attention` of equally many queries and keys, (B, H, T, K).

    A mask is true where a query may see a key; each query must see at least one key. The mask can only hide more keys,
    never show later ones. Compiled code calls this function without compiling it.
    """
    with torch.autocast(q_BHTK.device.type, enabled=False):
        mixed: Tensor = BlockedAttention.apply(q_BHTK, k_BGTK, v_BGTK, mask_B1TT)
    return mixed


class QueryBlock:
    """Some queries of some rows of a batch, and the keys that they may see."""

    def __init__(self, rows: slice, first: int, last: int, groups: int, mask_B1TT: Tensor | None) -> None:
        self.rows, self.queries, self.keys, self.groups = rows, slice(first, last), slice(0, last), groups
        # Without a mask only the last Q keys are hidden from some queries.
        self.masked = slice(first if mask_B1TT is None else 0, last)
        self.hidden = torch.ones(last - first, last - first, dtype=torch.bool).triu(1)
        if mask_B1TT is not None:
            self.hidden = ~mask_B1TT[rows, :, None, first:last, :last]
            self.hidden[..., first:] |= torch.ones(last - first, last - first, dtype=torch.bool).triu(1)

    def of_queries(self, x_BHTK: Tensor) -> Tensor:
        """Returns the block's queries, (N, R * Q, K)."""
        x_BGRQK = x_BHTK[self.rows, :, self.queries].unflatten(1, (-1, self.groups))
        return x_BGRQK.flatten(0, 1).flatten(1, 2)

    def of_keys(self, x_BGTK: Tensor) -> Tensor:
        """Returns the block's keys or values, (N, S, K)."""
        return x_BGTK[self.rows, :, self.keys].flatten(0, 1)

    def put(self, x_BHTK: Tensor, part_NPK: Tensor) -> None:
        target_BHQK = x_BHTK[self.rows, :, self.queries]
        target_BHQK.copy_(part_NPK.view(target_BHQK.shape))

    def scores(self, q_NPK: Tensor, k_NSK: Tensor, offset_NP1: Tensor | None) -> Tensor:
        """Returns scores minus the offset, (N, R * Q, S), -inf where hidden."""
        if offset_NP1 is None:
            scores_NPS = q_NPK @ k_NSK.transpose(1, 2)
        else:
            scores_NPS = torch.neg(offset_NP1.expand(-1, -1, k_NSK.shape[1])).baddbmm_(q_NPK, k_NSK.transpose(1, 2))
        rows = self.rows.stop - self.rows.start
        scores_BGRQS = scores_NPS.view(rows, -1, self.groups, self.queries.stop - self.queries.start, self.keys.stop)
        scores_BGRQS[..., self.masked].masked_fill_(self.hidden, float("-inf"))
        return scores_NPS

    def probabilities(self, q_NPK: Tensor, k_NSK: Tensor, largest_NP1: Tensor) -> Tensor:
        centred = largest_NP1 if largest_NP1.dtype in (torch.bfloat16, torch.float16) else None
        return F.softmax(self.scores(q_NPK, k_NSK, centred), dim=-1)


def blocks(q_BHTK: Tensor, groups: int, mask_B1TT: Tensor | None) -> Iterator[QueryBlock]:
    B, H, T, _ = q_BHTK.shape
    for first in range(0, T, BLOCK_QUERIES):
        last = min(first + BLOCK_QUERIES, T)
        step = max(1, BLOCK_SCORES // (H * (last - first) * last))
        for row in range(0, B, step):
            yield QueryBlock(slice(row, min(row + step, B)), first, last, groups, mask_B1TT)


class BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, mask_B1TT: Tensor | None) -> Tensor:
        groups = q_BHTK.shape[1] // k_BGTK.shape[1]
        q_BHTK = q_BHTK * q_BHTK.shape[-1] ** -0.5
        # After this one copy the keys of each block are a view.
        k_BGTK, v_BGTK = k_BGTK.contiguous(), v_BGTK.contiguous()
        # The memory layout is the one that the caller reads: the heads of a token lie side by side.
        mixed_BHTK = torch.empty_like(q_BHTK.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        largest_BHT1 = q_BHTK.new_zeros(*q_BHTK.shape[:3], 1)
        for block in blocks(q_BHTK, groups, mask_B1TT):
            q_NPK, k_NSK = block.of_queries(q_BHTK), block.of_keys(k_BGTK)
            if q_NPK.dtype in (torch.bfloat16, torch.float16):
                block.put(largest_BHT1, block.scores(q_NPK, k_NSK, None).amax(-1, keepdim=True))
            p_NPS = block.probabilities(q_NPK, k_NSK, block.of_queries(largest_BHT1))
            block.put(mixed_BHTK, p_NPS @ block.of_keys(v_BGTK))
        ctx.save_for_backward(q_BHTK, k_BGTK, v_BGTK, mask_B1TT, largest_BHT1)
        return mixed_BHTK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTK: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTK, k_BGTK, v_BGTK, mask_B1TT, largest_BHT1 = ctx.saved_tensors
        wide = torch.promote_types(q_BHTK.dtype, torch.float32)
        grad_q_BHTK = torch.empty_like(q_BHTK)
        # Every block adds to the gradients of keys and values.
        grad_k_BGTK, grad_v_BGTK = torch.zeros_like(k_BGTK, dtype=wide), torch.zeros_like(v_BGTK, dtype=wide)
        with torch.autocast(grad_BHTK.device.type, enabled=False):
            for block in blocks(q_BHTK, q_BHTK.shape[1] // k_BGTK.shape[1], mask_B1TT):
                q_NPK, k_NSK, v_NSK = block.of_queries(q_BHTK), block.of_keys(k_BGTK), block.of_keys(v_BGTK)
                grad_NPK = block.of_queries(grad_BHTK)
                p_NPS = block.probabilities(q_NPK, k_NSK, block.of_queries(largest_BHT1))
                seen = grad_v_BGTK[block.rows, :, block.keys]
                seen += (p_NPS.transpose(1, 2) @ grad_NPK).view(seen.shape)
                # Gradient of the probabilities, then of the scores.
                grad_NPS = torch._softmax_backward_data(grad_NPK @ v_NSK.transpose(1, 2), p_NPS, -1, p_NPS.dtype)
                block.put(grad_q_BHTK, grad_NPS @ k_NSK)
                seen = grad_k_BGTK[block.rows, :, block.keys]
                seen += (grad_NPS.transpose(1, 2) @ q_NPK).view(seen.shape)
        grad_q_BHTK *= q_BHTK.shape[-1] ** -0.5
        return grad_q_BHTK, grad_k_BGTK.to(k_BGTK.dtype), grad_v_BGTK.to(v_BGTK.dtype), None
