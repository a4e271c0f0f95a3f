"""Rotary positions and causal attention with grouped queries.

Shapes: B batch, T tokens of this call, S tokens attended to (T plus the tokens already in the cache), D hidden size,
H query heads, G key-value heads (G divides H), K channels of a head, P = B * T tokens of the flattened batch. Rotary
tables have the shape (B or 1, T, 1, K).
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device import constant_in_compiled_code
from .blocked_attention import blocked_attention, is_faster
from .elementwise import Turn, gains
from .masks import Blocks, Mask, Runs

if TYPE_CHECKING:
    from .config import RopeScaling


class Past(Protocol):
    """One layer's part of a key-value cache."""

    def extend(self, k_BGTK: Tensor, v_BGTK: Tensor) -> tuple[Tensor, Tensor]:
        """Adds keys and values of new tokens. Returns the keys and values of all tokens, (B, G, S, K) each."""


def inverse_frequencies(
    head_dim: int, theta: float, dtype: torch.dtype = torch.float32, scaling: "RopeScaling | None" = None
) -> Tensor:
    """Returns the angle in radians per token by which each pair of channels turns, (K / 2,).

    Computes on the CPU even for a model on a GPU, because `pow` differs between devices by about one unit in the last
    place. For a frequency that is 4e-4 radians at position 8192.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=dtype, device="cpu") / head_dim
    frequencies = 1.0 / theta**exponents
    return frequencies if scaling is None else scaled_frequencies(frequencies, scaling)


def scaled_frequencies(frequencies: Tensor, scaling: "RopeScaling") -> Tensor:
    """Returns frequencies slowed as in Llama 3.1. The order of operations is that of transformers, for equal bits."""
    context, low, high = scaling.original_max_position_embeddings, scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    slowed = torch.where(wavelengths > context / low, frequencies / scaling.factor, frequencies)
    smooth = (context / wavelengths - low) / (high - low)
    between = (1 - smooth) * slowed / scaling.factor + smooth * slowed
    is_between = (wavelengths >= context / high) & (wavelengths <= context / low)
    return torch.where(is_between, between, slowed)


def longest_context(head_dim: int, theta: float, scaling: "RopeScaling | None" = None) -> int:
    """Returns the longest context in tokens in which rotary positions let a query prefer a similar key.

    At all distances m inside it, the sum over all pairs of channels of cos(m × frequency) is not negative. In longer
    texts a model may still reach a low loss, but does not find facts in them (Men et al. 2024, arXiv 2405.14591).
    The search ends at 2^22 tokens.
    """
    frequencies = inverse_frequencies(head_dim, theta, torch.float64, scaling)
    step = 2**15
    for begin in range(0, 2**22, step):
        distances = torch.arange(begin, begin + step, dtype=torch.float64, device="cpu")
        below_0 = ((distances[:, None] * frequencies).cos().sum(1) < 0).nonzero()
        if len(below_0):
            return begin + int(below_0[0])
    return 2**22


def rotary_tables(position_ids_BT: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cosines and signed sines for `rotate`, in the precision of the frequencies."""
    angles = position_ids_BT[..., None].to(frequencies.dtype) * frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).unsqueeze(-2), torch.cat((-sin, sin), dim=-1).unsqueeze(-2)


def rotate(x_BTHK: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
    """Turns channels i and i + K/2 as one pair. This is Hugging Face's layout; Meta's pairs i and i + 1.

    The sine table already has the signs, so one roll replaces the usual split, negation and concatenation. The bits are
    equal; the time is 5.9 instead of 6.8 ms in float32 and 6.8 instead of 7.1 ms in bfloat16 (one core, forward and
    backward, 4 x 1024 tokens, 12 heads of 64).
    """
    if gains(x_BTHK) and x_BTHK.dtype == cos_BT1K.dtype:
        own: Tensor = Turn.apply(x_BTHK, cos_BT1K, sin_BT1K)
        return own
    turned = x_BTHK * cos_BT1K + x_BTHK.roll(x_BTHK.shape[-1] // 2, dims=-1) * sin_BT1K
    return turned.to(x_BTHK.dtype)


class RotaryEmbedding(nn.Module):
    """Computes the rotary tables for the positions of each call. All layers share them.

    Recomputing T x K/2 cosines costs almost nothing compared with one layer, and no table needs a size in advance.

    Frequencies and angles are float32 in a float64 model, too. transformers does so, hence published weights expect
    these rounded angles. With exact angles, logits of up to 7 (two random layers, float64) moved by 1e-6 within 16
    tokens and by 3e-4 within 1024. With the rounded angles they agree with transformers to 2e-14.
    """

    def __init__(self, head_dim: int, theta: float, scaling: "RopeScaling | None" = None) -> None:
        super().__init__()
        self.head_dim, self.theta, self.scaling = head_dim, theta, scaling
        # On the device of the parameters. On the meta device the numbers would be lost.
        device = torch.get_default_device()
        self.register_buffer(
            "frequencies", self._computed().to("cpu" if device.type == "meta" else device), persistent=False
        )
        self.frequencies: Tensor

    def _computed(self) -> Tensor:
        return inverse_frequencies(self.head_dim, self.theta, scaling=self.scaling)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # .to(bfloat16) would round the frequencies, .to_empty() would leave them uninitialized: take only the device.
        super()._apply(fn, recurse)
        device = self.frequencies.device
        self.frequencies = self._computed()
        if device.type != "meta":
            self.frequencies = self.frequencies.to(device)
        return self

    def forward(self, position_ids_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns tables for activations of `dtype`, at least in float32.

        bfloat16 tables would save about 1 ms of the 6.8 ms in `rotate`, but round every cosine to 8 bits.
        """
        cos, sin = rotary_tables(position_ids_BT, self.frequencies.to(position_ids_BT.device))
        if dtype == torch.float64:
            cos, sin = cos.double(), sin.double()
        return cos, sin


class GroupedQueryAttention(nn.Module):
    """Causal attention in which H / G query heads share a key-value head: H = G is multi-head, G = 1 multi-query.

    Args:
        bias: queries, keys and values have biases.
        q_norm, k_norm: modules over the channels of each head, before the rotary positions.
        rotary: queries and keys get rotary positions.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        dropout: float = 0.0,
        *,
        bias: bool = False,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        rotary: bool = True,
    ) -> None:
        super().__init__()
        assert heads % kv_heads == 0, (heads, kv_heads)
        self.head_dim, self.groups, self.dropout, self.rotary = head_dim, heads // kv_heads, dropout, rotary
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=False)
        self.q_norm, self.k_norm = q_norm, k_norm

    def forward(
        self,
        hidden_BTD: Tensor,
        cos_BT1K: Tensor,
        sin_BT1K: Tensor,
        mask: Mask | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Returns (B, T, D). Without a mask the attention is causal and makes no T x S tensor.

        A given mask replaces the causal mask. A tensor has the shape (B or 1, 1, T, S): true where a token is seen, or
        what is added to the scores. Runs and blocks are for tokens that follow no filled cache.
        """
        B, T, _ = hidden_BTD.shape
        q_BTHK, k_BTGK, v_BTGK = self.project(hidden_BTD, cos_BT1K, sin_BT1K)
        q_BHTK, k_BGSK, v_BGSK = q_BTHK.transpose(1, 2), k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2)
        if past is not None:
            k_BGSK, v_BGSK = past.extend(k_BGSK, v_BGSK)
            if T == 1:
                assert mask is None or isinstance(mask, Tensor)
                return self.o_proj(attend_once(q_BHTK, k_BGSK, v_BGSK, mask).reshape(B, 1, -1))
        if isinstance(mask, Runs):
            return self.o_proj(attend_in_runs(q_BTHK, k_BTGK, v_BTGK, mask).reshape(B, T, -1))
        if isinstance(mask, Blocks):
            mixed_BHTK = attend_in_blocks(q_BHTK, k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2), mask)
            return self.o_proj(mixed_BHTK.transpose(1, 2).reshape(B, T, -1))
        mask_B1TS = mask
        assert mask_B1TS is not None or k_BGSK.shape[2] == T, "several tokens after a filled cache need a mask"

        if past is None and not (self.dropout and self.training) and is_faster(q_BHTK):
            mixed_BHTK = blocked_attention(q_BHTK, k_BGSK, v_BGSK, mask_B1TS)
            return self.o_proj(mixed_BHTK.transpose(1, 2).reshape(B, T, -1))

        grouped = self.groups > 1
        if grouped and not takes_grouped_heads(q_BHTK, mask_B1TS):
            k_BGSK, v_BGSK = repeat_heads(k_BGSK, self.groups), repeat_heads(v_BGSK, self.groups)
            grouped = False
        mixed_BHTK = F.scaled_dot_product_attention(
            q_BHTK,
            k_BGSK,
            v_BGSK,
            attn_mask=mask_B1TS,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask_B1TS is None and T > 1,
            enable_gqa=grouped,
        )
        return self.o_proj(mixed_BHTK.transpose(1, 2).reshape(B, T, -1))

    def project(self, hidden_BTD: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values of each head; queries and keys are already normed and rotated."""
        B, T, _ = hidden_BTD.shape
        q_BTHK = self.placed(self.q_proj(hidden_BTD).view(B, T, -1, self.head_dim), self.q_norm, cos_BT1K, sin_BT1K)
        k_BTGK = self.placed(self.k_proj(hidden_BTD).view(B, T, -1, self.head_dim), self.k_norm, cos_BT1K, sin_BT1K)
        return q_BTHK, k_BTGK, self.v_proj(hidden_BTD).view(B, T, -1, self.head_dim)

    def placed(self, x_BTHK: Tensor, norm: nn.Module | None, cos_BT1K: Tensor, sin_BT1K: Tensor) -> Tensor:
        """Returns query or key heads after their norm and rotary positions, if the layer has these."""
        if norm is not None:
            x_BTHK = norm(x_BTHK)
        return rotate(x_BTHK, cos_BT1K, sin_BT1K) if self.rotary else x_BTHK


def attend_once(q_BH1K: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_B11S: Tensor | None) -> Tensor:
    """Returns a decoding step's attention, one new token per row over the cached tokens: (B, G, H / G, K).

    The query heads of a group are laid out as tokens of one head, because they may see the same keys. A kernel that
    knows no groups then reads each key once for its group. Over 1024 cached tokens (9 query heads, 3 key-value heads of
    64 channels, one core) this takes 88 instead of 730 us in bfloat16, 72 instead of 77 us in float32.
    """
    B, H, _, K = q_BH1K.shape
    G = k_BGSK.shape[1]
    q_BGJK = q_BH1K.reshape(B, G, H // G, K)
    if torch.compiler.is_compiling():
        return sums_of_products(q_BGJK, k_BGSK, v_BGSK, mask_B11S)
    return F.scaled_dot_product_attention(q_BGJK, k_BGSK, v_BGSK, attn_mask=mask_B11S)


def sums_of_products(q_BGJK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_B11S: Tensor | None) -> Tensor:
    """Returns attention of J query heads per key-value head over the cached tokens, in a form for the compiler.

    The compiler fuses it into loops; in eager mode every product would be in memory. In a compiled step it takes 100 us
    where PyTorch's kernel takes 131 us over 512 cached tokens, and 321 against 504 us over 2048 (16 query heads, 8
    key-value heads of 96 channels, bfloat16, one core of an EPYC).
    """
    dtype = torch.promote_types(q_BGJK.dtype, torch.float32)
    scores_BGJS = (q_BGJK[:, :, :, None].to(dtype) * k_BGSK[:, :, None].to(dtype)).sum(-1) * q_BGJK.shape[-1] ** -0.5
    if mask_B11S is not None:
        scores_BGJS = scores_BGJS.masked_fill(~mask_B11S, -torch.inf)
    shares_BGJS = scores_BGJS.softmax(-1)
    return (shares_BGJS[..., None] * v_BGSK[:, :, None].to(dtype)).sum(-2).to(v_BGSK.dtype)


def takes_grouped_heads(q_BHTK: Tensor, mask_B1TS: Tensor | None) -> bool:
    """Returns whether a fused kernel accepts fewer key-value heads than query heads.

    CPU: always. It is not slower than repeated heads in training (one core, forward and backward, 4 x 512 tokens, 8
    query heads, 4 key-value heads: 45.8 against 49.8 ms in float32, 44.6 against 48.2 ms in bfloat16).

    CUDA, PyTorch 2.11 to 2.13: flash attention and cuDNN do, both in 16 bits. Flash attention takes no mask. cuDNN
    takes one, but is not asked before the kernel that stores all scores (B, H, T, S), except on Hopper and Blackwell,
    and not where lengths change (`without_plans`). The memory-efficient kernel, which takes float32 and masks, learns
    grouped heads only in a later PyTorch. Hence with a mask or in float32, heads are repeated, which every kernel
    takes. Decoding steps use `attend_once`.
    """
    return not q_BHTK.is_cuda or (mask_B1TS is None and q_BHTK.dtype in (torch.bfloat16, torch.float16))


def repeat_heads(x_BGSK: Tensor, groups: int) -> Tensor:
    """Returns (B, H, S, K) from (B, G, S, K): each head `groups` times in a row."""
    B, G, S, K = x_BGSK.shape
    return x_BGSK[:, :, None].expand(B, G, groups, S, K).reshape(B, G * groups, S, K)


# --- lengths that change, on CUDA -------------------------------------------------------------------------------------

STEADY = 128
"""Lengths that this number divides are expected to return. Others change from batch to batch."""


def kernels_for(device: torch.device, tokens: int, *, cached: bool) -> Callable[[], AbstractContextManager[None]]:
    """Returns the context in which attention of this shape picks its kernel.

    From version 2.11 on, PyTorch asks cuDNN first on Hopper and Blackwell. cuDNN makes a plan for each new shape, which
    takes the host 23 to 37 ms. That pays where a shape returns, as in pre-training and in packed rows. With a cache
    the shape changes with every token, and in unpadded batches from one to the next: there flash attention is faster,
    although its kernel is slower. A context of 1,000 tokens counts as changing; one of 1,024 does not.

    The choice depends on the shape alone, so a resumed run computes what an uninterrupted one does.
    """
    steady = tokens % STEADY == 0 and not cached
    return nullcontext if device.type != "cuda" or steady or torch.compiler.is_compiling() else without_plans


@contextmanager
def without_plans() -> Iterator[None]:
    """Makes attention not ask cuDNN."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


# --- what CUDA has for masks ------------------------------------------------------------------------------------------


def attend_in_runs(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, runs: Runs) -> Tensor:
    """Returns causal attention within each run, by flash attention, (P, H, K)."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"enable_gqa": True} if varlen_asks_for_groups() else {}
    # Tokens to the left besides the token itself; none to the right.
    options["window_size"] = (-1 if runs.window is None else runs.window - 1, 0)
    q_PHK, k_PGK, v_PGK = q_BTHK.flatten(0, 1), k_BTGK.flatten(0, 1), v_BTGK.flatten(0, 1)
    starts_N1, longest = runs.starts_N1, runs.longest
    mixed_PHK: Any = varlen_attn(q_PHK, k_PGK, v_PGK, starts_N1, starts_N1, longest, longest, **options)
    return cast(Tensor, mixed_PHK)


@constant_in_compiled_code
def varlen_asks_for_groups() -> bool:
    """Returns whether grouped heads must be announced. PyTorch 2.11 has no argument for it: the kernel sees them."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


def attend_in_blocks(q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, blocks: Blocks) -> Tensor:
    """Returns attention by FlexAttention, (B, H, T, K)."""
    from torch.nn.attention.flex_attention import flex_attention

    # Uncompiled, it stores all scores. Within a compiled block it is compiled with the block.
    eagerly = q_BHTK.is_cuda and not torch.compiler.is_compiling()
    attend: Any = compiled_flex() if eagerly else flex_attention
    mixed_BHTK: Tensor = attend(q_BHTK, k_BGTK, v_BGTK, block_mask=blocks.mask, enable_gqa=True)
    return mixed_BHTK


@functools.cache
def compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
