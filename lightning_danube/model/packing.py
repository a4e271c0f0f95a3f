"""Decoders that only generate, with their matrices stored as the device's kernels read them fastest.

A decoding step at batch 1 reads every weight once and computes almost nothing. Its speed is the speed at which a kernel
streams a matrix, plus what each call costs. Which layout is fastest depends on the type, the number of rows and the
processor. Matrices that share an input become one matrix, because a call of a packed layer costs 8 us more than
F.linear.

ms for the 106 million weights of SmolLM2-135M's blocks (120 matrices), CPU time of one core of an EPYC (Zen 4) on a
busy machine, the best of ten. AVX2 was emulated on the same core (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA,
FBGEMM_ENABLE_INSTRUCTIONS, MKL_ENABLE_INSTRUCTIONS). Activations have the weight's type, with FBGEMM and where the
weight is converted they are float32:

                                     AVX-512                             AVX2
    rows                             1     2     8    32   128           1     2     8    32   128
    float32, F.linear             41.7  70.2  87.5   141   388        41.8  66.1  66.4   156   383
    float32, stored by columns    31.6  42.3  97.4   169   383        30.8  45.6  77.4   144   366
    float32, oneDNN               37.7  45.9  50.7   106   299        46.8  50.3  69.5   120   328
    bfloat16, F.linear            31.5  31.6  51.3    89   195        14.5  25.1  94.0   492  1547
    bfloat16, oneDNN              18.9  23.0  23.8    50   157           -     -     -     -     -
    bfloat16, converted           27.2  39.1  89.9   180   387        27.5  41.5  62.5   146   411
    float16, F.linear             14.6  23.8   131   487  2031        13.8  24.0  97.3   411  1812
    float16, FBGEMM               11.7  12.2  27.7    95   301        11.8  12.2  23.5    81   299

So 16-bit weights go to oneDNN where the processor multiplies their type, and to FBGEMM elsewhere. float16 has more
digits than bfloat16, so FBGEMM holds bfloat16 weights exactly unless they are very large or very small. float32 goes to
oneDNN, but one row on AVX2 is read by columns. There a prompt of 64 tokens takes about 10 % longer (238 and
259 ms, not 221 and 225), and each new token 20 % less (50 and 54 ms, not 61 and 67).

torch.compile uses oneDNN's operators, too, when it freezes a model and finds a C++ compiler.

On a GPU matrices of one input become one, too, in their plain layout: a compiled step then has ten kernels a layer
beside attention's three, not thirteen, and no product of few rows (by the program that torch 2.11 generates). What that
gains was not measured.
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
"""Rows up to which `ConvertingLinear` multiplies in 16 bits. With AVX2 alone 4 rows take as long either way (bfloat16,
the matrices above: 46 ms, converted 49)."""


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

    def __init__(self, weight: Tensor) -> None:
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
