"""Decoders that only generate, with their matrices as the device's kernels read them best.

A decoding step at batch 1 reads every weight once and computes next to nothing, so what counts is how fast a kernel
streams a matrix, and what each call costs besides. F.linear calls MKL for float32, and oneDNN for bfloat16 with the
matrix as it lies. From oneDNN's own blocked layout both stream about twice as fast, and other numbers of rows gain, too
(see `LAYOUT_ROWS`). torch.compile does the same when it freezes a model, with a C++ compiler at hand; these are the
operators that it calls. As a call of theirs costs 8 us more than F.linear, matrices that share an input become one.

On a GPU matrices of one input become one, too, as they lie: a compiled step then has ten kernels a layer beside
attention's three, not thirteen, and no product of few rows (by the program that torch 2.11 generates). What that gains
was not measured.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device import onednn_packs
from .attention import GroupedQueryAttention, rotate
from .decoder import Block, Decoder, SwiGLU

OPERATORS = torch.ops.mkldnn
LAYOUT_ROWS = 16
"""The number of rows to choose a layout for. From 2 to 256 it is the same one, which serves every number; for 1 oneDNN
chooses another, which is slower in float32 and no faster in bfloat16.

ms for 71 million weights (80 matrices of SmolLM2-135M; one core of an EPYC with AVX-512):

    rows                            1     2     4     8    32   128
    float32, F.linear            17.5  31.7  27.3  32.5  77.7   240
    float32, this layout          9.6  10.7  11.1  16.8  41.5    90
    float32, the one for 1 row   14.1  19.0  19.5  22.8  38.1   103
    bfloat16, F.linear           10.6  14.9  10.7  20.7  37.1    97
    bfloat16, this layout         6.0   6.2   6.0  11.9  28.7    89
"""


def pack_for_generation(decoder: Decoder) -> bool:
    """Pack the matrices of a decoder, where that gains anything: on a CPU in float32 and bfloat16, on a GPU in all
    types. Whether it did.

    A packed decoder can neither be trained nor saved nor moved. Each matrix is let go when its packed copy is there, so
    memory stays the same but for a tied embedding, which is still needed as it is. Layers that are more than plain
    matrices (quantized ones, adapters) stay as they are.
    """
    if not isinstance(decoder.lm_head, nn.Linear):
        return False
    weight = decoder.lm_head.weight
    if weight.device.type == "cpu":
        if not onednn_packs(weight.dtype):
            return False
        pack(decoder, PackedLinear)
        if are_plain(decoder.lm_head):
            decoder.lm_head = PackedLinear([decoder.lm_head])  # type: ignore[assignment]
    else:
        pack(decoder, JoinedLinear)
    return True


def pack(decoder: Decoder, linear: "type[PackedLinear | JoinedLinear]") -> None:
    """Replace the blocks' plain matrices."""
    for block in decoder.model.layers:
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        if are_plain(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            block.self_attn = PackedAttention(attention, linear)
        if are_plain(mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            block.mlp = PackedSwiGLU(mlp, linear)


def are_plain(*layers: nn.Module) -> bool:
    """Not instances of subclasses, which compute something else."""
    return all(type(layer) is nn.Linear and layer.bias is None for layer in layers)


class JoinedLinear(nn.Module):
    """Linear layers that share an input, as one: their outputs one behind the other."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class PackedLinear(nn.Module):
    """The same in oneDNN's layout."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        weight = torch.cat([layer.weight.detach() for layer in layers])
        # Not in a state_dict, which could do nothing with the opaque layout. A buffer, so that a compiler may take it
        # for a constant: of others these operators can not be compiled.
        self.register_buffer("packed", OPERATORS._reorder_linear_weight(weight, LAYOUT_ROWS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = OPERATORS._linear_pointwise(x, self.packed, None, "none", [], "")
        return y


class PackedAttention(GroupedQueryAttention):
    def __init__(self, plain: GroupedQueryAttention, linear: type[PackedLinear | JoinedLinear]) -> None:
        nn.Module.__init__(self)
        self.head_dim, self.groups, self.dropout = plain.head_dim, plain.groups, plain.dropout
        self.kv_heads = plain.k_proj.out_features // plain.head_dim
        self.qkv_proj = linear([plain.q_proj, plain.k_proj, plain.v_proj])
        self.o_proj = linear([plain.o_proj])  # type: ignore[assignment]

    def project(self, hidden_BTD: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = hidden_BTD.shape
        G, H = self.kv_heads, self.kv_heads * self.groups
        heads = self.qkv_proj(hidden_BTD).view(B, T, -1, self.head_dim)
        # Queries and keys turn alike, so they turn together.
        turned = rotate(heads[:, :, : H + G], cos_BT1K, sin_BT1K)
        return turned[:, :, :H], turned[:, :, H:], heads[:, :, H + G :]


class PackedSwiGLU(SwiGLU):
    def __init__(self, plain: SwiGLU, linear: type[PackedLinear | JoinedLinear]) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj = linear([plain.gate_proj, plain.up_proj])
        self.down_proj = linear([plain.down_proj])  # type: ignore[assignment]

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_BTD).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)
