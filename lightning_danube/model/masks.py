"""Which tokens a token may see, in the form that the device's attention reads.

A dense mask has B x T x T values, and a kernel that reads it computes the whole square. On CUDA two other forms need
O(T) memory and compute only what is seen: runs of tokens, and blocks of 128 x 128 scores. `form_of` chooses.

Shapes: B batch, T tokens of this call, S tokens attended to, N runs of a batch, Q blocks of tokens in a row.
"""

from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compilation import has_triton

BLOCK = 128
"""Queries and keys of a block of scores. It is FlexAttention's default, and the step of flash attention."""

Form = Literal["runs", "blocks", "dense"]


class Runs(NamedTuple):
    """Tokens of the flattened batch (B * T) in runs that do not see each other; attention in a run is causal.

    Args:
        starts_N1: where each run begins, and at last B * T, int32.
        longest: at least the tokens of the longest run. It decides how many blocks a kernel starts for each run.
        window: tokens that a token sees, including itself; None: all earlier tokens of the run.
    """

    starts_N1: Tensor
    longest: int
    window: int | None = None


class Blocks(NamedTuple):
    """FlexAttention's mask: the blocks of scores to compute, and a function for the blocks that are seen in part."""

    mask: Any


Mask = Tensor | Runs | Blocks
"""What attention may be given instead of being causal over the whole row."""


# --- dense ------------------------------------------------------------------------------------------------------------


def causal_mask(tokens: int, past: int, device: torch.device, window: int | None = None) -> Tensor:
    """Returns a mask (1, 1, T, S), true where token past + i may see token j: j is not later and within the window.

    It is needed for texts longer than a window, and to extend a filled cache by several tokens: the kernel's own causal
    mask aligns the queries with the first keys, not with the last.
    """
    seen_TS = torch.ones(tokens, past + tokens, dtype=torch.bool, device=device).tril(past)
    return (seen_TS if window is None else seen_TS.triu(past - window + 1))[None, None]


def document_mask(document_ids_BT: Tensor, window: int | None = None) -> Tensor:
    """Returns a mask (B, 1, T, T), true where a token may see another token.

    A token sees tokens that are not later, in the same document and within the last `window`. Every token sees itself,
    so no row is empty, whatever ids the padding has. An id that returns later in a row means the same document.
    """
    seen_BTT = (document_ids_BT[:, :, None] == document_ids_BT[:, None, :]).tril()
    return (seen_BTT if window is None else seen_BTT.triu(1 - window))[:, None]


def as_bias(mask_B1TS: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what a kernel adds to the scores: 0 where the mask is true, else -inf.

    CUDA's kernels take only this form. They would make it from a mask again in every layer, and each layer would keep
    its own for the backward pass: 0.8 GB a layer for 6 rows of 8,192 tokens in 16 bits.
    """
    return torch.zeros_like(mask_B1TS, dtype=dtype).masked_fill_(~mask_B1TS, -torch.inf)


# --- runs -------------------------------------------------------------------------------------------------------------


def runs_of(document_ids_BT: Tensor) -> Runs | None:
    """Returns the documents of a batch as runs; None if an id returns later in its row, so that runs would separate
    what is one document.

    Call it where the batch is made: the number of runs is a shape, so for ids on a GPU the host would have to wait.
    """
    assert document_ids_BT.device.type == "cpu", "a GPU's ids would make the host wait"
    B, T = document_ids_BT.shape
    before, after = document_ids_BT[:, :-1], document_ids_BT[:, 1:]
    begins_BT = F.pad(after != before, (1, 0), value=True)
    if not bool((after >= before).all()):
        sorted_BT = document_ids_BT.sort(dim=1).values
        if int(begins_BT.sum()) != B + int((sorted_BT[:, 1:] != sorted_BT[:, :-1]).sum()):
            return None
    starts_N1 = F.pad(begins_BT.flatten().nonzero()[:, 0], (0, 1), value=B * T)
    # A power of two, because compiled code takes a number that changes as a new one, and is compiled again.
    longest = max(BLOCK, 1 << (int(starts_N1.diff().max()) - 1).bit_length())
    return Runs(starts_N1.to(torch.int32), min(longest, T))


def whole_rows(rows: int, tokens: int, device: torch.device) -> Runs:
    """Returns each row as one run."""
    return Runs(torch.arange(0, rows * tokens + 1, tokens, dtype=torch.int32, device=device), tokens)


# --- blocks -----------------------------------------------------------------------------------------------------------


def blocks_of(document_ids_BT: Tensor, window: int | None = None) -> Blocks:
    """Returns FlexAttention's form of `document_mask`. Nothing here makes the host wait, or has T x T values.

    A block is computed if its queries' and keys' ranges of ids overlap. That may be one block too many, where the ids
    of a row are not sorted, but never too few: the exact ids decide within each block that is not seen as a whole.
    """
    from torch.nn.attention.flex_attention import BlockMask

    B, T = document_ids_BT.shape
    blocks = -(-T // BLOCK)
    # Padding repeats the last id, so it widens no range.
    padded_BT = torch.cat([document_ids_BT, document_ids_BT[:, -1:].expand(-1, blocks * BLOCK - T)], dim=1)
    low_BQ, high_BQ = padded_BT.view(B, blocks, BLOCK).aminmax(dim=-1)
    numbers_Q = torch.arange(blocks, device=document_ids_BT.device)
    # Distance in blocks from a block of keys back to a block of queries.
    back_QQ = numbers_Q[:, None] - numbers_Q[None, :]
    some_QQ, whole_QQ = back_QQ >= 0, back_QQ > 0
    if window is not None:
        some_QQ, whole_QQ = some_QQ & ((back_QQ - 1) * BLOCK + 1 < window), whole_QQ & ((back_QQ + 1) * BLOCK <= window)
    overlap_BQQ = (low_BQ[:, :, None] <= high_BQ[:, None, :]) & (low_BQ[:, None, :] <= high_BQ[:, :, None])
    one_id_BQ = low_BQ == high_BQ
    one_id_BQQ = one_id_BQ[:, :, None] & one_id_BQ[:, None, :] & (low_BQ[:, :, None] == low_BQ[:, None, :])
    whole_BQQ = one_id_BQQ & whole_QQ
    partial_BQQ = overlap_BQQ & some_QQ & ~whole_BQQ

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (document_ids_BT[row, query] == document_ids_BT[row, key]) & (key <= query)
        return same if window is None else same & (query - key < window)

    mask = BlockMask.from_kv_blocks(
        *_numbered(partial_BQQ), *_numbered(whole_BQQ), BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(T, T)
    )
    return Blocks(mask)


def _numbered(chosen_BQQ: Tensor) -> tuple[Tensor, Tensor]:
    """Returns for each block of queries how many blocks of keys are chosen, (B, 1, Q), and their numbers before all
    others, (B, 1, Q, Q)."""
    order_BQQ = chosen_BQQ.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen_BQQ.sum(-1, dtype=torch.int32)[:, None], order_BQQ.to(torch.int32)[:, None]


# --- the choice -------------------------------------------------------------------------------------------------------


def form_of(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float, *, runs: bool) -> Form:
    """Returns the form in which attention of this type gets what its tokens see.

    CPU: dense, which `blocked_attention` and the kernel of PyTorch read. CUDA:

    * "runs" where flash attention can: 16 bits, head sizes up to 256 that 8 divides, compute capability 8.0. It has a
      kernel for each head size (FlexAttention rounds 96 up to 128), and needs no compiler.
    * "blocks", for FlexAttention, if the type is float32, or if it is not known on the host that documents are runs.
    * "dense" with dropout, which neither of the two has; for float64; and on AMD's GPUs, where neither was looked at.

    Args:
        dropout: the dropout in force now.
        runs: whether the documents are known to be runs.
    """
    if device.type != "cuda" or dropout or torch.version.hip is not None:
        return "dense"
    if runs and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256 and _flash(device):
        return "runs"
    if dtype in (torch.bfloat16, torch.float16, torch.float32) and head_dim >= 16 and has_triton():
        return "blocks"
    return "dense"


def _flash(device: torch.device) -> bool:
    """Returns whether flash attention runs on this GPU."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def mask_of(
    form: Form,
    document_ids_BT: Tensor | None,
    runs: Runs | None,
    shape: tuple[int, int],
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Mask:
    """Returns in this form what the tokens of a batch see.

    Args:
        document_ids_BT: None: each row is one document.
        runs: the same documents as runs, if they are known to be runs.
        shape: B and T.
        dtype: the type of attention's scores.
    """
    B, T = shape
    if form == "runs":
        known = whole_rows(B, T, device) if document_ids_BT is None else runs
        assert known is not None
        return known._replace(window=window)
    if form == "blocks":
        if document_ids_BT is None:
            document_ids_BT = torch.zeros(B, T, dtype=torch.int32, device=device)
        return blocks_of(document_ids_BT, window)
    mask = causal_mask(T, 0, device, window) if document_ids_BT is None else document_mask(document_ids_BT, window)
    return (as_bias(mask, dtype) if device.type == "cuda" else mask).expand(B, -1, -1, -1)
