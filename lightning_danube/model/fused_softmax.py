"""The loss's softmax and its derivative as two kernels for GPUs, written in Triton.

PyTorch's operations pass about ten times over the logits in float32. The first kernel here reads the logits once, the
second kernel reads them once more and writes the derivative in their place, in their own type. All arithmetic is in
float32. Between the kernels, devices that share a vocabulary reduce their statistics (loss.py).

Only loss.py imports this module, and only if Triton is installed. Without a GPU, the environment variable
TRITON_INTERPRET=1 runs the kernels on CPU tensors; it must be set before the import.

Shapes: C tokens of one chunk, V vocabulary of this device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 4096
"""Logits of a token that a program holds at once: 16 KiB in float32."""
WARPS = 8


@triton.jit
def statistics_kernel(  # type: ignore[no-untyped-def]
    logits,
    labels,
    largest,
    sums,
    targets,
    vocabulary,
    stride,
    ignore_index,
    start,
    missing,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + token)
    top = 0.0
    total = 1.0
    target = 0.0
    if label != ignore_index:
        row = logits + token * stride
        top = float("-inf")
        total = 0.0
        for first in range(0, vocabulary, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            some = tl.load(row + column, mask=column < vocabulary, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(some, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(some - higher), 0)
            top = higher
        own = label - start
        target = missing
        if (own >= 0) & (own < vocabulary):
            target = tl.load(row + own).to(tl.float32)
    tl.store(largest + token, top)
    tl.store(sums + token, total)
    tl.store(targets + token, target)


@triton.jit
def derivative_kernel(  # type: ignore[no-untyped-def]
    logits,
    labels,
    largest,
    factors,
    scales,
    vocabulary,
    stride,
    start,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    scale = tl.load(scales + token)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = logits + token * stride + column
    here = column < vocabulary
    if scale == 0.0:  # reads nothing
        tl.store(place, tl.zeros([COLUMNS], logits.dtype.element_ty), mask=here)
    else:
        some = tl.load(place, mask=here, other=float("-inf")).to(tl.float32)
        some = tl.exp(some - tl.load(largest + token)) * tl.load(factors + token)
        own = tl.load(labels + token) - start
        some -= tl.where(column == own, scale, 0.0)
        tl.store(place, some.to(logits.dtype.element_ty), mask=here)


def row_statistics(
    logits_CV: Tensor, labels_C: Tensor, ignore_index: int, start: int, missing: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns for each token the largest logit, the sum of exp(logit - largest), and the label's logit, (C,).

    They are float32. For ignored tokens they are 0, 1 and 0, and their logits are not read.

    Args:
        start: number of the first logit in the whole vocabulary.
        missing: given as the logit of a label that is not among these logits.
    """
    tokens, vocabulary = logits_CV.shape
    assert logits_CV.stride(1) == 1 and labels_C.is_contiguous(), (logits_CV.stride(), labels_C.stride())
    largest_C, sums_C, targets_C = torch.empty(3, tokens, dtype=torch.float32, device=logits_CV.device)
    with torch.cuda.device_of(logits_CV):
        statistics_kernel[(tokens,)](
            logits_CV,
            labels_C,
            largest_C,
            sums_C,
            targets_C,
            vocabulary,
            logits_CV.stride(0),
            ignore_index,
            start,
            missing,
            COLUMNS=COLUMNS,
            num_warps=WARPS,
        )
    return largest_C, sums_C, targets_C


def write_derivative(
    logits_CV: Tensor, labels_C: Tensor, largest_C: Tensor, sums_C: Tensor, scale_C: Tensor, start: int
) -> None:
    """Replaces logits by (softmax - one-hot label) * scale; by 0 where the scale is 0.

    The sums, the largest logits and the scales are float32, of the whole vocabulary.
    """
    tokens, vocabulary = logits_CV.shape
    assert logits_CV.stride(1) == 1, logits_CV.stride()
    with torch.cuda.device_of(logits_CV):
        derivative_kernel[(tokens, triton.cdiv(vocabulary, COLUMNS))](
            logits_CV,
            labels_C,
            largest_C,
            scale_C / sums_C,
            scale_C,
            vocabulary,
            logits_CV.stride(0),
            start,
            COLUMNS=COLUMNS,
            num_warps=WARPS,
        )
