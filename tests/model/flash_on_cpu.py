"""Flash attention's operators on a CPU, one segment after the other: what the variable-length attention of PyTorch
calls on a GPU. Registered for the time of a test, they show with which arguments the kernel would be called.

Shapes: P tokens of all segments, H query heads, G key-value heads, K channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """The arguments of the forward kernel that decide who sees whom."""

    starts: list[int]
    longest: int
    causal: bool
    left: int
    right: int
    heads: int
    kv_heads: int


def of_segments(call: Call, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields for each segment which of its tokens see which, and its part of each tensor with repeated heads."""
    for start, end in zip(call.starts[:-1], call.starts[1:], strict=True):
        assert end - start <= call.longest, "the kernel would not compute the rest of this segment"
        places = torch.arange(end - start)
        distance = places[:, None] - places[None]
        seen = distance >= 0 if call.causal or call.right == 0 else torch.ones_like(distance, dtype=torch.bool)
        if call.left >= 0:
            seen &= distance <= call.left
        parts = (tensor[start:end].transpose(0, 1) for tensor in tensors)
        yield seen, *(part.repeat_interleave(call.heads // len(part), dim=0) for part in parts)


def shares(q_HTK: Tensor, k_HTK: Tensor, seen_TT: Tensor) -> Tensor:
    scores_HTT = q_HTK @ k_HTK.transpose(1, 2) * q_HTK.shape[-1] ** -0.5
    return scores_HTT.masked_fill(~seen_TT, -torch.inf).softmax(-1)


def forward_of(call: Call, q_PHK: Tensor, k_PGK: Tensor, v_PGK: Tensor) -> Tensor:
    parts = [
        (shares(q, k, seen) @ v).transpose(0, 1) for seen, q, k, v in of_segments(call, q_PHK, k_PGK, v_PGK)
    ]  # fmt: skip
    return torch.cat(parts)


def backward_of(call: Call, grad_PHK: Tensor, q_PHK: Tensor, k_PGK: Tensor, v_PGK: Tensor) -> tuple[Tensor, ...]:
    """Returns the gradients, written out, because PyTorch calls the operator below autograd."""
    parts: list[list[Tensor]] = [[], [], []]
    for seen, grad, q, k, v in of_segments(call, grad_PHK, q_PHK, k_PGK, v_PGK):
        p_HTT = shares(q, k, seen)
        of_p = grad @ v.transpose(1, 2)
        of_scores = p_HTT * (of_p - (of_p * p_HTT).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        of_k, of_v = of_scores.transpose(1, 2) @ q, p_HTT.transpose(1, 2) @ grad
        summed = (x.unflatten(0, (call.kv_heads, -1)).sum(1) for x in (of_k, of_v))
        for part, gradient in zip(parts, (of_scores @ k, *summed), strict=True):
            part.append(gradient.transpose(0, 1))
    return tuple(map(torch.cat, parts))


@contextmanager
def flash_on_cpu() -> Iterator[list[Call]]:
    """Yields the calls of the forward kernel."""
    calls: list[Call] = []

    def called(q: Tensor, k: Tensor, starts_q: Tensor, starts_k: Tensor, most: Any, dropout: Any, options: Any) -> Call:
        assert torch.equal(starts_q, starts_k) and starts_q.dtype == torch.int32 and dropout == 0.0
        left, right = options["window_size_left"], options["window_size_right"]
        return Call(starts_q.tolist(), most, options["causal"], left, right, q.shape[1], k.shape[1])

    def forward(
        q: Any, k: Any, v: Any, starts_q: Any, starts_k: Any, max_q: Any, max_k: Any, dropout: Any, causal: Any,
        return_debug_mask: bool = False, **options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert max_q == max_k
        calls.append(called(q, k, starts_q, starts_k, max_q, dropout, {**options, "causal": causal}))
        empty = q.new_empty(0)
        return forward_of(calls[-1], q, k, v), q.new_zeros(q.shape[1], len(q)), empty, empty.clone(), empty.clone()

    def backward(
        grad: Any, q: Any, k: Any, v: Any, out: Any, sums: Any, starts_q: Any, starts_k: Any, max_q: Any, max_k: Any,
        dropout: Any, causal: Any, rng_state: Any, unused: Any, **options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert max_q == max_k
        call = called(q, k, starts_q, starts_k, max_q, dropout, {**options, "causal": causal})
        return backward_of(call, grad, q, k, v)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield calls
    finally:
        library._destroy()
