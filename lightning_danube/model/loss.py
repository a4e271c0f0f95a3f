"""Cross-entropy of the next token from hidden states and the head's weight, a chunk of tokens at a time.

All logits of 16 x 8192 tokens over a vocabulary of 32000 take 17 GB in float32, and their gradient as much again. Only
one chunk of them is in memory at a time. For a sum, the forward pass also computes the gradients while it has the
chunk's logits, so nothing is computed twice.

On a GPU two Triton kernels (fused_softmax.py) do the work between the matrix products, in place on the 16-bit logits.

If the vocabulary of the head is divided over devices (parallel.py), each device has a part of the logits. The devices
then reduce the largest logit, the sum of exponentials and the label's logit, and sum the gradients of the hidden
states.

Shapes: B batch, T tokens, N = B * T, C tokens of one chunk, D hidden size, V vocabulary (of this device).
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..device import type_under_autocast
from .compilation import has_triton
from .config import CHUNK_TOKENS, gpu_chunk_tokens

SOFTMAX_TOKENS = 32
"""Tokens whose logits go through the softmax together. In float32 these logits stay in a core's cache between passes:
4096 tokens over a vocabulary of 32000 in bfloat16 take 134 ms, and 185 ms with 1024 tokens at a time."""
NOTHING_IGNORED = -1
"""No label has this number."""


class VocabularyPart(NamedTuple):
    """The part of a divided vocabulary on this device: it begins at `start`. Other devices of `group` have the rest."""

    group: Any
    start: int

    def sum(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values, group=self.group)
        return values

    def largest(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self.group)
        return values


def local_head(weight_VD: Tensor) -> tuple[Tensor, VocabularyPart | None]:
    """Returns the rows of the head on this device, and which part of the vocabulary they are; None for all rows."""
    if not hasattr(weight_VD, "device_mesh"):  # no distributed tensor
        return weight_VD, None
    distributed_VD: Any = weight_VD
    mesh, (placement,) = distributed_VD.device_mesh, distributed_VD.placements
    assert placement.is_shard(0), placement
    local_VD: Tensor = distributed_VD.to_local()
    # check_tensor_parallel has checked that all parts have the same size.
    return local_VD, VocabularyPart(mesh.get_group(), mesh.get_local_rank() * len(local_VD))


def next_token_loss(
    hidden_BTD: Tensor,
    head_weight_VD: Tensor,
    labels_BT: Tensor,
    *,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the sum of nats and the number of counted tokens, both scalars.

    The sum is differentiable, in float32 (float64 for float64 input). It is not a mean, because micro-batches and ranks
    with unequal counts must be added first.

    Labels are already shifted: labels[t] is the token after input[t]. Under autocast the matrix products have its type
    and the softmax is in float32, like F.cross_entropy on autocast logits. Without a counted token, the sum and the
    gradients are 0. Nothing here waits for a GPU.

    Args:
        chunk_tokens: tokens whose logits are in memory at once; None: as many as are fast on the device.
    """
    check_arguments(hidden_BTD, head_weight_VD, labels_BT, chunk_tokens)
    head_weight_VD, part = local_head(head_weight_VD)
    hidden_ND, labels_N = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), labels_BT.reshape(-1).long()
    dtype = product_dtype(hidden_BTD, head_weight_VD)
    chunk_tokens = chunk_tokens or tokens_of_a_chunk(head_weight_VD, dtype)
    total: Tensor = ChunkedCrossEntropy.apply(
        hidden_ND, head_weight_VD, labels_N, ignore_index, chunk_tokens, dtype, torch.is_grad_enabled(), part
    )
    return total, (labels_N != ignore_index).sum()


def token_losses(
    hidden_BTD: Tensor,
    head_weight_VD: Tensor,
    labels_BT: Tensor,
    *,
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Returns the nats of each token, (B, T), 0 where ignored; differentiable, in float32 (float64 for float64 input).

    Use it for losses whose token weights depend on the nats of all tokens. These weights are known only in the backward
    pass, which computes the logits of each chunk again. For a plain sum use `next_token_loss`, which computes them
    once. Ignored tokens, such as a prompt, cost nothing.
    """
    check_arguments(hidden_BTD, head_weight_VD, labels_BT, chunk_tokens)
    head_weight_VD, part = local_head(head_weight_VD)
    labels_N = labels_BT.reshape(-1).long()
    counted_C = (labels_N != ignore_index).nonzero().squeeze(1)
    hidden_CD = hidden_BTD.reshape(-1, hidden_BTD.shape[-1]).index_select(0, counted_C)
    dtype = product_dtype(hidden_BTD, head_weight_VD)
    chunk_tokens = chunk_tokens or tokens_of_a_chunk(head_weight_VD, dtype)
    nats_C: Tensor = ChunkedTokenNats.apply(hidden_CD, head_weight_VD, labels_N[counted_C], chunk_tokens, dtype, part)
    return nats_C.new_zeros(len(labels_N)).index_copy(0, counted_C, nats_C).view(labels_BT.shape)


class ChunkedTokenNats(torch.autograd.Function):
    """Nats of each token; the backward pass computes the logits again, a chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        chunk_tokens: int,
        dtype: torch.dtype,
        part: VocabularyPart | None,
    ) -> Tensor:
        with torch.autocast(hidden_ND.device.type, enabled=False):
            h_ND, w_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
            logits = LogitsBuffer(min(chunk_tokens, len(h_ND)), w_VD, part)
            nats_N = h_ND.new_empty(len(h_ND), dtype=logits.wide_dtype)
            for start in range(0, len(h_ND), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                nats_N[rows], _ = logits.nats(h_ND[rows], w_VD, labels_N[rows], NOTHING_IGNORED, with_derivative=False)
        ctx.save_for_backward(h_ND, weight_VD, labels_N)
        ctx.chunk_tokens, ctx.hidden_dtype, ctx.part = chunk_tokens, hidden_ND.dtype, part
        return nats_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        h_ND, weight_VD, labels_N = ctx.saved_tensors
        w_VD = weight_VD.to(h_ND.dtype)
        logits = LogitsBuffer(min(ctx.chunk_tokens, len(h_ND)), w_VD, ctx.part)
        grad_h_ND = torch.empty_like(h_ND) if ctx.needs_input_grad[0] else None
        grad_w_VD = torch.zeros_like(w_VD, dtype=logits.wide_dtype) if ctx.needs_input_grad[1] else None
        with torch.autocast(h_ND.device.type, enabled=False):
            for start in range(0, len(h_ND), ctx.chunk_tokens):
                rows = slice(start, start + ctx.chunk_tokens)
                _, derivative_CV = logits.nats(h_ND[rows], w_VD, labels_N[rows], NOTHING_IGNORED, grad_N[rows])
                if grad_h_ND is not None:
                    torch.mm(derivative_CV, w_VD, out=grad_h_ND[rows])
                if grad_w_VD is not None:
                    add_product(grad_w_VD, derivative_CV, h_ND[rows])
        if grad_h_ND is not None and ctx.part is not None:
            ctx.part.sum(grad_h_ND)
        return (
            None if grad_h_ND is None else grad_h_ND.to(ctx.hidden_dtype),
            None if grad_w_VD is None else grad_w_VD.to(weight_VD.dtype),
            *[None] * 4,
        )


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of nats; the backward pass only scales what the forward pass computed."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        labels_N: Tensor,
        ignore_index: int,
        chunk_tokens: int,
        dtype: torch.dtype,
        with_gradient: bool,
        part: VocabularyPart | None,
    ) -> Tensor:
        # needs_input_grad ignores torch.no_grad, so validation needs `with_gradient` as well.
        wants_hidden = with_gradient and ctx.needs_input_grad[0]
        wants_weight = with_gradient and ctx.needs_input_grad[1]
        # Cast once here: autocast would cast the weight again for each chunk and keep the copies.
        with torch.autocast(hidden_ND.device.type, enabled=False):
            h_ND, w_VD = hidden_ND.to(dtype), weight_VD.to(dtype)
            logits = LogitsBuffer(min(chunk_tokens, len(h_ND)), w_VD, part)
            total = h_ND.new_zeros((), dtype=logits.wide_dtype)
            grad_h_ND = torch.empty_like(h_ND) if wants_hidden else None
            grad_w_VD = torch.zeros_like(w_VD, dtype=logits.wide_dtype) if wants_weight else None
            for start in range(0, len(h_ND), chunk_tokens):
                rows = slice(start, start + chunk_tokens)
                nats_C, derivative_CV = logits.nats(
                    h_ND[rows], w_VD, labels_N[rows], ignore_index, with_derivative=wants_hidden or wants_weight
                )
                total += nats_C.sum()
                if grad_h_ND is not None:
                    torch.mm(derivative_CV, w_VD, out=grad_h_ND[rows])
                if grad_w_VD is not None:
                    add_product(grad_w_VD, derivative_CV, h_ND[rows])
        if grad_h_ND is not None and part is not None:
            part.sum(grad_h_ND)
        ctx.save_for_backward(
            None if grad_h_ND is None else grad_h_ND.to(hidden_ND.dtype),
            None if grad_w_VD is None else grad_w_VD.to(weight_VD.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        grad_h_ND, grad_w_VD = ctx.saved_tensors
        return (
            None if grad_h_ND is None else grad_h_ND * grad_total.to(grad_h_ND.dtype),
            None if grad_w_VD is None else grad_w_VD * grad_total.to(grad_w_VD.dtype),
            *[None] * 6,
        )


class LogitsBuffer:
    """Memory for the logits of one chunk. All operations on tensors of this size are in place.

    New memory for each step and chunk costs more time in page faults than the arithmetic that fills it. `narrow` holds
    the inputs and outputs of matrix products; `wide` (float32 or float64) holds the values of the softmax. Both are the
    same tensor if the types are equal. On a CPU the softmax takes `step` tokens at a time, and `wide` has only as many
    rows. With the fused kernels there is no `wide`.
    """

    def __init__(self, rows: int, weight_VD: Tensor, part: VocabularyPart | None = None) -> None:
        self.part = part
        self.narrow = weight_VD.new_empty(rows, len(weight_VD))
        self.wide_dtype = torch.float64 if weight_VD.dtype == torch.float64 else torch.float32
        self.kernels = fused_kernels(weight_VD.device, weight_VD.dtype)
        self.is_wide = weight_VD.dtype == self.wide_dtype
        if self.kernels is None:
            self.step = SOFTMAX_TOKENS if part is None and weight_VD.device.type == "cpu" else max(rows, 1)
            some = self.narrow[: self.step]
            self.wide = self.narrow if self.is_wide else torch.empty_like(some, dtype=self.wide_dtype)

    def nats(
        self,
        hidden_CD: Tensor,
        weight_VD: Tensor,
        labels_C: Tensor,
        ignore_index: int,
        times_C: Tensor | None = None,
        with_derivative: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Returns the nats of each token, 0 where ignored, and their derivative with respect to the logits, (C, V).

        The derivative is (softmax - one-hot label) * `times_C`, 0 where ignored. Without `with_derivative` the second
        tensor has no meaningful values.
        """
        product_CV = self.narrow[: len(labels_C)]
        torch.mm(hidden_CD, weight_VD.t(), out=product_CV)
        if self.kernels is not None:
            return self._fused(product_CV, labels_C, ignore_index, times_C, with_derivative), product_CV
        nats_C = product_CV.new_empty(len(labels_C), dtype=self.wide_dtype)
        for start in range(0, len(labels_C), self.step):
            some = slice(start, min(start + self.step, len(labels_C)))
            times = None if times_C is None else times_C[some]
            nats_C[some] = self._softmax(product_CV[some], labels_C[some], ignore_index, times, with_derivative)
        return nats_C, product_CV

    def _fused(
        self, product_CV: Tensor, labels_C: Tensor, ignore_index: int, times_C: Tensor | None, with_derivative: bool
    ) -> Tensor:
        """Returns the nats of a chunk, and replaces its logits by the derivative.

        A label outside the vocabulary gives NaN, because no kernel can raise an error without the host waiting for it.
        """
        kernels, counted_C = self.kernels, labels_C != ignore_index
        start, missing = (0, float("nan")) if self.part is None else (self.part.start, 0.0)
        largest_C, sums_C, target_C = kernels.row_statistics(product_CV, labels_C, ignore_index, start, missing)
        if self.part is not None:
            own_C, largest_C = largest_C, self.part.largest(largest_C.clone())
            target_C, sums_C = self.part.sum(torch.stack([target_C, sums_C * (own_C - largest_C).exp()]))
        if with_derivative:
            scale_C = counted_C.float() if times_C is None else times_C.float() * counted_C
            kernels.write_derivative(product_CV, labels_C, largest_C, sums_C, scale_C, start)
        return (sums_C.log() - (target_C - largest_C)).where(counted_C, 0)

    def _softmax(
        self, product_CV: Tensor, labels_C: Tensor, ignore_index: int, times_C: Tensor | None, with_derivative: bool
    ) -> Tensor:
        """Returns the nats of some tokens, and replaces their logits by the derivative."""
        logits_CV = product_CV if self.is_wide else self.wide[: len(labels_C)].copy_(product_CV)
        counted_C = labels_C != ignore_index
        here_C, labels_C = self._here(labels_C, counted_C)
        largest_C1 = logits_CV.amax(1, keepdim=True)
        logits_CV -= largest_C1 if self.part is None else self.part.largest(largest_C1)
        target_C = logits_CV.gather(1, labels_C[:, None]).squeeze(1)
        sums_C = logits_CV.exp_().sum(1)
        if self.part is not None:
            target_C, sums_C = self.part.sum(torch.stack([target_C.where(here_C, 0), sums_C]))
        if with_derivative:
            scale_C = counted_C.to(logits_CV.dtype) if times_C is None else times_C.to(logits_CV.dtype) * counted_C
            logits_CV *= (scale_C / sums_C)[:, None]
            logits_CV.scatter_add_(1, labels_C[:, None], -scale_C.where(here_C, 0)[:, None])
            if not self.is_wide:
                product_CV.copy_(logits_CV)
        return (sums_C.log() - target_C).where(counted_C, 0)

    def _here(self, labels_C: Tensor, counted_C: Tensor) -> tuple[Tensor, Tensor]:
        """Returns whether each label is counted and on this device, and its row in the local head, otherwise 0."""
        if self.part is None:
            return counted_C, labels_C.where(counted_C, 0)
        own_C = labels_C - self.part.start
        here_C = counted_C & (own_C >= 0) & (own_C < self.narrow.shape[1])
        return here_C, own_C.where(here_C, 0)


@functools.cache
def softmax_kernels() -> Any:
    """Returns the module of the fused kernels; None without Triton."""
    if not has_triton():
        return None
    from . import fused_softmax

    return fused_softmax


def fused_kernels(device: torch.device, dtype: torch.dtype) -> Any:
    """Returns the module of the fused kernels if they can take logits of this device and type, otherwise None."""
    if device.type != "cuda" or dtype == torch.float64 or torch.compiler.is_compiling():
        return None
    return softmax_kernels()


def tokens_of_a_chunk(weight_VD: Tensor, dtype: torch.dtype) -> int:
    """Returns the tokens whose logits are in memory at once."""
    if fused_kernels(weight_VD.device, dtype) is None:
        return CHUNK_TOKENS
    return gpu_chunk_tokens(len(weight_VD), dtype.itemsize)


def add_product(total_VD: Tensor, derivative_CV: Tensor, hidden_CD: Tensor) -> None:
    """Adds one chunk's gradient of the head to the total, in the type of the total."""
    if total_VD.dtype == derivative_CV.dtype:
        total_VD.addmm_(derivative_CV.t(), hidden_CD)
    else:
        total_VD += derivative_CV.t() @ hidden_CD


def product_dtype(hidden_BTD: Tensor, head_weight_VD: Tensor) -> torch.dtype:
    """Returns the type of the matrix products: autocast's type if it is on, except that float64 stays float64."""
    dtype = torch.promote_types(hidden_BTD.dtype, head_weight_VD.dtype)
    return type_under_autocast(dtype, hidden_BTD.device.type)


def check_arguments(hidden_BTD: Tensor, head_weight_VD: Tensor, labels_BT: Tensor, chunk_tokens: int | None) -> None:
    if hidden_BTD.shape[:-1] != labels_BT.shape or hidden_BTD.shape[-1] != head_weight_VD.shape[-1]:
        raise ValueError(
            f"hidden states {tuple(hidden_BTD.shape)}, head {tuple(head_weight_VD.shape)} and labels "
            f"{tuple(labels_BT.shape)} do not fit together: they are (B, T, D), (V, D) and (B, T)"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it has to be at least 1")
