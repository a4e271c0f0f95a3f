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

import itertools
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..device import fastest_type, fbgemm_packs, mkl_reads_columns_faster, onednn_multiplies, onednn_packs
from .attention import GroupedQueryAttention, rotate
from .decoder import Block, Decoder, RMSNorm, SwiGLU

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


FEW_ROWS = 4
"""Rows up to which `ConvertingLinear` multiplies in 16 bits."""


def pack_for_generation(decoder: Decoder, *, rows: int = 1) -> bool:
    """Packs the matrices of a decoder where that makes generation faster. Returns whether it did.

    `rows` is the number of texts that are continued at once. The layout that is fastest for one row is slower for many.

    A packed decoder can neither be trained nor saved nor moved. Each matrix is freed when its packed copy is made, so
    memory stays the same, except for a tied embedding: its plain copy is still needed. Layers that are more than plain
    matrices (quantized layers, adapters) stay as they are.

    On a CPU that multiplies 16-bit matrices slowly, 16-bit weights stay in 16 bits and everything else becomes float32:
    hidden states, logits and the cache.
    """
    if not isinstance(decoder.lm_head, nn.Linear):
        return False
    weight = decoder.lm_head.weight
    if weight.device.type != "cpu":
        pack(decoder, JoinedLinear)
    elif weight.dtype == torch.float32 and rows == 1 and mkl_reads_columns_faster():
        pack(decoder, TransposedLinear)
        pack_head(decoder, TransposedLinear)
    elif onednn_packs(weight.dtype):
        pack(decoder, PackedLinear)
        pack_head(decoder, PackedLinear)
    elif weight.dtype in (torch.bfloat16, torch.float16) and has_only_plain_matrices(decoder):
        if onednn_multiplies(weight.dtype) or (not fbgemm_packs() and fastest_type() != torch.float32):
            return False
        pack(decoder, linear_of_16_bits)
        pack_head(decoder, linear_of_16_bits)
        widen_activations(decoder)
    else:
        return False
    return True


Join = Callable[[Sequence[nn.Linear]], nn.Module]
"""Makes one linear layer of layers that share an input."""


def pack(decoder: Decoder, linear: Join) -> None:
    """Replaces the plain matrices of the blocks."""
    for block in decoder.model.layers:
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        if are_plain(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            block.self_attn = PackedAttention(attention, linear)
        if are_plain(mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            block.mlp = PackedSwiGLU(mlp, linear)


def pack_head(decoder: Decoder, linear: Join) -> None:
    if are_plain(decoder.lm_head):
        decoder.lm_head = linear([decoder.lm_head])  # type: ignore[assignment]


def are_plain(*layers: nn.Module) -> bool:
    """Whether all are nn.Linear without a bias. A subclass computes something else."""
    return all(type(layer) is nn.Linear and layer.bias is None for layer in layers)


def has_only_plain_matrices(decoder: Decoder) -> bool:
    """Whether every module with weights is one of those that `Decoder` itself makes."""
    holders = (module for module in decoder.modules() if next(module.parameters(recurse=False), None) is not None)
    return all(are_plain(module) or type(module) in (nn.Embedding, RMSNorm) for module in holders)


def widen_activations(decoder: Decoder) -> None:
    """Makes the hidden states of a decoder float32. Its linear layers must take float32 inputs."""
    decoder.model.embed_tokens = WideEmbedding(decoder.model.embed_tokens.weight)  # type: ignore[assignment]
    for module in decoder.modules():
        if isinstance(module, RMSNorm):
            module.float()


class WideEmbedding(nn.Module):
    """An embedding that is stored in 16 bits and gives float32."""

    activation_dtype = torch.float32

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        return F.embedding(ids_BT, self.weight).float()


class JoinedLinear(nn.Module):
    """Linear layers that share an input, as one layer. Its output is their outputs one after the other."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class TransposedLinear(JoinedLinear):
    """A linear layer whose weight is stored by columns, (in, out): the products of a column are then neighbours."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        nn.Module.__init__(self)
        weight_KN = torch.cat([layer.weight.detach().t() for layer in layers], dim=1).contiguous()
        self.weight = nn.Parameter(weight_KN.t(), requires_grad=False)


class PackedLinear(nn.Module):
    """A linear layer whose weight is stored in oneDNN's packed layout."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        weight = torch.cat([layer.weight.detach() for layer in layers])
        # Not in a state_dict, which could do nothing with the opaque layout. A buffer, so that a compiler may take it
        # for a constant: of others these operators can not be compiled.
        self.register_buffer("packed", OPERATORS._reorder_linear_weight(weight, LAYOUT_ROWS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = OPERATORS._linear_pointwise(x, self.packed, None, "none", [], "")
        return y


def linear_of_16_bits(layers: Sequence[nn.Linear]) -> nn.Module:
    """A linear layer for float32 inputs whose weight keeps 16 bits."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    if fbgemm_packs() and fits_float16(weight):
        return Float16Linear(weight)
    return ConvertingLinear(weight)


def fits_float16(weight: Tensor) -> bool:
    """Whether float16 holds these values with an error below 2^-20 of the largest one, so that no sum notices.

    float16 has more digits than bfloat16. Only the range is smaller: values beyond 65,504 become infinite, and values
    below 6e-5 have a fixed error of 3e-8.
    """
    error = (weight.half().float() - weight.float()).abs().max()
    return bool(error <= 2**-20 * weight.abs().max())


class Float16Linear(nn.Module):
    """A linear layer for float32 inputs whose weight FBGEMM stores in float16. Products and sums are float32."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features = len(weight)
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
        self.number = next(NUMBERS)
        FLOAT16_LAYERS[self.number] = self

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            y: Tensor = float16_linear(x, self.number)
        else:
            y = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        return y


NUMBERS = itertools.count()
FLOAT16_LAYERS: WeakValueDictionary[int, Float16Linear] = WeakValueDictionary()
"""The layers by number. A compiler can pass a number to an operator, and no matrix of FBGEMM."""


@torch.library.custom_op("lightning_danube::float16_linear", mutates_args=())
def float16_linear(x: Tensor, number: int) -> Tensor:
    y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, FLOAT16_LAYERS[number].packed)
    return y


@float16_linear.register_fake
def _(x: Tensor, number: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], FLOAT16_LAYERS[number].out_features)


class ConvertingLinear(nn.Module):
    """A linear layer for float32 inputs whose weight is stored in 16 bits, where nothing multiplies 16 bits fast.

    Few rows are rounded to 16 bits, because reading the weight takes most of the time. For many rows this one matrix
    is converted to float32.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() // x.shape[-1] <= FEW_ROWS:
            return F.linear(x.to(self.weight.dtype), self.weight).float()
        return F.linear(x, self.weight.float())


class PackedAttention(GroupedQueryAttention):
    def __init__(self, plain: GroupedQueryAttention, linear: Join) -> None:
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
    def __init__(self, plain: SwiGLU, linear: Join) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj = linear([plain.gate_proj, plain.up_proj])
        self.down_proj = linear([plain.down_proj])  # type: ignore[assignment]

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(hidden_BTD).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)
