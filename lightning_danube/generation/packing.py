"""Decoders that only generate, with their matrices stored in the layout that the device's kernels read fastest.

A decoding step at batch 1 reads every weight once and computes almost nothing. Its time is the time in which a kernel
streams a matrix, plus the cost of each call. Which layout is fastest depends on the type, the number of rows and the
processor. Matrices that share an input become one matrix, because a call of a packed layer costs 8 us more than
F.linear.

Wall time in ms for the 106 million weights of SmolLM2-135M's blocks (120 matrices), on two cores of an idle EPYC
(Zen 4), the best of ten. AVX2 was emulated on these cores (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA,
FBGEMM_ENABLE_INSTRUCTIONS, MKL_ENABLE_INSTRUCTIONS). Activations have the weight's type; with FBGEMM, and where the
weight is converted, they are float32 (python benchmarks/layouts.py --threads 2):

                                     AVX-512                             AVX2
    rows                             1     2     8    32   128           1     2     8    32   128
    float32, F.linear             42.0  76.7  47.1  79.6   193        42.8  80.6  47.4  76.2   197
    float32, batch of products    19.7  32.5  36.0  65.4   177        22.0  32.4  36.4  63.0   179
    float32, oneDNN               25.3  28.3  26.6  47.4   143        28.8  27.8  32.8  56.2   158
    bfloat16, F.linear            17.3  18.5  23.2  32.7    84         9.4  11.2  45.6   177   679
    bfloat16, oneDNN              13.4  15.0  13.2  25.0    74           -     -     -     -     -
    bfloat16, converted           18.5  27.2  44.9  77.2   189        19.1  28.8  44.7  74.0   193
    float16, F.linear              9.2  11.4  45.5   175   679         9.0  11.5  45.8   175   686
    float16, FBGEMM                8.8   9.3  12.8  38.3   137         8.0   8.4  14.3  39.5   138

So 16-bit weights go to oneDNN where the processor multiplies their type, and to FBGEMM elsewhere. float16 has more
digits than bfloat16, so FBGEMM holds bfloat16 weights exactly unless they are very large or very small. float32 goes to
oneDNN, except for a single text, where it becomes a batch of products. A prompt of 128 tokens then takes an eighth to a
quarter longer, and each new token a third less (whole steps: docs/generation.md).

torch.compile also uses oneDNN's operators when it freezes a model and finds a C++ compiler.

On a GPU, matrices that share an input are also joined, in their plain layout. A compiled step then has ten kernels per
layer beside attention's three, instead of thirteen, and no product of few rows (by the program that torch 2.11
generates). The gain was not measured.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_danube.device import fastest_type, fbgemm_packs, onednn_multiplies, onednn_packs
from lightning_danube.model.attention import GroupedQueryAttention, Past, attend_once, rotate
from lightning_danube.model.decoder import Block, Decoder, RMSNorm, SwiGLU
from lightning_danube.model.masks import Mask

OPERATORS = torch.ops.mkldnn
LAYOUT_ROWS = 16
"""The number of rows for which oneDNN chooses a layout. From 2 to 256 rows, oneDNN chooses one layout, which suits any
number of rows. For 1 row it chooses another layout, which is slower in float32 and no faster in bfloat16.

ms for 71 million weights (80 matrices of SmolLM2-135M; one core of an EPYC with AVX-512):

    rows                            1     2     4     8    32   128
    float32, F.linear            17.5  31.7  27.3  32.5  77.7   240
    float32, this layout          9.6  10.7  11.1  16.8  41.5    90
    float32, the one for 1 row   14.1  19.0  19.5  22.8  38.1   103
    bfloat16, F.linear           10.6  14.9  10.7  20.7  37.1    97
    bfloat16, this layout         6.0   6.2   6.0  11.9  28.7    89
"""


PARTS = 8
"""Products of a batch in `SplitLinear`. One row is equally fast with 4 to 64; 64 rows are slower with 16 or more."""

FEW_ROWS = 4
"""Rows up to which `ConvertingLinear` multiplies in 16 bits. With AVX2 only, 4 rows take about equally long in 16 bits
and converted (bfloat16, the matrices above: 46 ms, converted 49)."""


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
    elif weight.dtype == torch.float32 and rows == 1 and torch.backends.mkl.is_available():
        pack(decoder, SplitLinear)
        pack_head(decoder, SplitLinear)
    elif onednn_packs(weight.dtype):
        pack(decoder, PackedLinear)
        pack_head(decoder, PackedLinear)
    elif weight.dtype in (torch.bfloat16, torch.float16) and has_only_plain_matrices(decoder):
        if onednn_multiplies(weight.dtype) or (not fbgemm_packs() and fastest_type() != torch.float32):
            return False
        widen_activations(decoder)
        pack(decoder, linear_of_16_bits)
        pack_head(decoder, linear_of_16_bits)
    else:
        return False
    return True


Join = Callable[[Sequence[nn.Linear]], nn.Module]
"""Joins linear layers that share an input into one layer."""


def pack(decoder: Decoder, linear: Join) -> None:
    """Replaces the plain matrices of the blocks."""
    layers = decoder.model.layers
    for index, block in enumerate(layers):
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        inputs = (attention.q_proj, attention.k_proj, attention.v_proj)
        if are_plain(attention.o_proj) and are_plain(*inputs):
            block.self_attn = PackedAttention(attention, linear)
        if are_plain(mlp.gate_proj, mlp.up_proj) and are_plain(mlp.down_proj):
            block.mlp = PackedSwiGLU(mlp, linear)
        if block.self_attn is not attention and block.mlp is not mlp:
            layers[index] = PackedBlock(block)
    decoder.model.register_module("norm", packed_norm(decoder.model.norm))


def pack_head(decoder: Decoder, linear: Join) -> None:
    if are_plain(decoder.lm_head):
        decoder.register_module("lm_head", joined_linear([decoder.lm_head], linear))


def are_plain(*layers: nn.Module) -> bool:
    """Returns whether all layers are nn.Linear, and all or none of them have a bias.

    Subclasses do not count: they compute something else.
    """
    return all(type(layer) is nn.Linear for layer in layers) and len({layer.bias is None for layer in layers}) == 1


def joined_linear(layers: Sequence[nn.Linear], linear: Join) -> nn.Module:
    """Joins plain layers that share an input, with their biases if they have any."""
    return linear(layers) if layers[0].bias is None else WithBias(layers, linear)


def has_only_plain_matrices(decoder: Decoder) -> bool:
    """Returns whether every module with weights is of a kind that `Decoder` itself makes."""
    holders = (module for module in decoder.modules() if next(module.parameters(recurse=False), None) is not None)
    return all(type(module) in (nn.Linear, nn.Embedding, RMSNorm) for module in holders)


def widen_activations(decoder: Decoder) -> None:
    """Makes the hidden states of a decoder float32. Its linear layers must take float32 inputs."""
    decoder.model.register_module("embed_tokens", WideEmbedding(decoder.model.embed_tokens.weight))
    for module in decoder.modules():
        if isinstance(module, RMSNorm):
            module.float()


class WideEmbedding(nn.Module):
    """An embedding that is stored in 16 bits and returns float32."""

    activation_dtype = torch.float32

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        return F.embedding(ids_BT, self.weight).float()


class JoinedLinear(nn.Module):
    """Linear layers that share an input, as one layer. Its output is their outputs, concatenated."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class WithBias(nn.Module):
    """A linear layer of any layout, plus the concatenated biases of the layers that it joins."""

    def __init__(self, layers: Sequence[nn.Linear], linear: Join) -> None:
        super().__init__()
        self.linear = linear(layers)
        self.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y.add_(self.bias)


class SplitLinear(nn.Module):
    """A linear layer that is computed as a batch of products, each with a part of the output channels.

    MKL uses one thread to multiply one row by a large matrix, and all threads for a batch of matrices.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        weights = [layer.weight.detach() for layer in layers]
        # A single weight is not copied, so a tied head still shares the embedding's memory.
        weight = weights[0] if len(weights) == 1 else torch.cat(weights)
        self.weight_PNK: Tensor
        # A buffer, as in PackedLinear, because the compiler does not assume a constant shape for other tensors.
        self.register_buffer(
            "weight_PNK", weight.view(math.gcd(len(weight), PARTS), -1, weight.shape[1]), persistent=False
        )

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            y: Tensor = split_linear(x, self.weight_PNK)
            return y
        return products_of_parts(x, self.weight_PNK)


def products_of_parts(x: Tensor, weight_PNK: Tensor) -> Tensor:
    """Multiplies x (…, K) by a weight of P parts with N output channels each. Returns (…, P N)."""
    x_PRK = x.reshape(1, -1, x.shape[-1]).expand(len(weight_PNK), -1, -1)
    if x_PRK.shape[1] == 1:
        return torch.bmm(weight_PNK, x_PRK.transpose(1, 2)).view(*x.shape[:-1], -1)
    y_PRN = torch.bmm(x_PRK, weight_PNK.transpose(1, 2))
    return y_PRN.transpose(0, 1).reshape(*x.shape[:-1], -1)


# One operator for the compiler, which would otherwise turn these products into loops that take twice as long.
split_linear = torch.library.custom_op(
    "lightning_danube::split_linear", products_of_parts, mutates_args=(), schema="(Tensor x, Tensor weight) -> Tensor"
)


@split_linear.register_fake
def _(x: Tensor, weight_PNK: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight_PNK.shape[0] * weight_PNK.shape[1])


class PackedLinear(nn.Module):
    """A linear layer whose weight is stored in oneDNN's packed layout."""

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        weight = torch.cat([layer.weight.detach() for layer in layers])
        self.packed: Tensor
        # Not in the state_dict, because the layout is opaque. A buffer, so that the compiler may treat the weight as a
        # constant: otherwise these operators cannot be compiled.
        self.register_buffer("packed", OPERATORS._reorder_linear_weight(weight, LAYOUT_ROWS), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            y: Tensor = packed_linear(x, self.packed)
            return y
        return product_with_packed(x, self.packed)


def product_with_packed(x: Tensor, packed: Tensor) -> Tensor:
    """Multiplies x (…, K) by a weight (N, K) in oneDNN's layout. Returns (…, N)."""
    y: Tensor = OPERATORS._linear_pointwise(x, packed, None, "none", [], "")
    return y


# One operator for the compiler. It would take oneDNN's operator for its own, and look for the plain weight.
packed_linear = torch.library.custom_op(
    "lightning_danube::packed_linear",
    product_with_packed,
    mutates_args=(),
    schema="(Tensor x, Tensor packed) -> Tensor",
)


@packed_linear.register_fake
def _(x: Tensor, packed: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def linear_of_16_bits(layers: Sequence[nn.Linear]) -> nn.Module:
    """Returns a linear layer for float32 inputs whose weight stays in 16 bits."""
    weight = torch.cat([layer.weight.detach() for layer in layers])
    if fbgemm_packs() and fits_float16(wide := weight.float()):
        return Float16Linear(wide)
    return ConvertingLinear(weight)


def fits_float16(weight: Tensor) -> bool:
    """Returns whether float16 holds all values of a float32 tensor with an error below 2^-20 of the largest.

    No sum is sensitive to so small an error. float16 has more digits than bfloat16, but a smaller range: values beyond
    65,504 become infinite, and values below 6e-5 have a fixed error of 3e-8.
    """
    error = weight.half().float().sub_(weight)
    return bool(largest(error) <= 2**-20 * largest(weight))


def largest(x: Tensor) -> Tensor:
    """Returns the largest absolute value, in half the time of `x.abs().max()`."""
    least, most = x.aminmax()
    return torch.maximum(-least, most)


class Float16Linear(nn.Module):
    """A linear layer for float32 inputs whose weight FBGEMM stores in float16. Products and sums are float32.

    Args:
        weight: in float32.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features = len(weight)
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, None)
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
"""Number → layer. A compiler can pass a number to an operator, but not a matrix in FBGEMM's layout."""


@torch.library.custom_op("lightning_danube::float16_linear", mutates_args=())
def float16_linear(x: Tensor, number: int) -> Tensor:
    y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x, FLOAT16_LAYERS[number].packed)
    return y


@float16_linear.register_fake
def _(x: Tensor, number: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], FLOAT16_LAYERS[number].out_features)


class ConvertingLinear(nn.Module):
    """A linear layer for float32 inputs with a 16-bit weight, for CPUs without a fast 16-bit multiplication.

    A few rows are rounded to 16 bits, because reading the weight takes most of the time. For many rows the weight is
    converted to float32 in each call.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() // x.shape[-1] <= FEW_ROWS:
            return F.linear(x.to(self.weight.dtype), self.weight).float()
        return F.linear(x, self.weight.float())


# PyTorch takes 2 us to look up and call a submodule. That is a tenth of a token's time in a model with 30 small layers.
# So the modules below store the functions of their submodules as attributes.


class PackedBlock(Block):
    """A block whose attention and feed-forward are packed."""

    def __init__(self, plain: Block) -> None:
        nn.Module.__init__(self)
        self.self_attn, self.mlp = plain.self_attn, plain.mlp
        self.register_module("input_layernorm", packed_norm(plain.input_layernorm))
        self.register_module("post_attention_layernorm", packed_norm(plain.post_attention_layernorm))
        self.norms = self.input_layernorm.forward, self.post_attention_layernorm.forward
        self.attend, self.feed_forward = self.self_attn.forward, self.mlp.forward

    def forward(
        self,
        hidden_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Mask | None = None,
        past: Past | None = None,
        selective: bool = False,
    ) -> Tensor:
        assert not selective, "packed blocks are not for training"
        first_norm, second_norm = self.norms
        hidden_BTD = self.attend(first_norm(hidden_BTD), cos, sin, mask, past).add_(hidden_BTD)
        return self.feed_forward(second_norm(hidden_BTD)).add_(hidden_BTD)


class PackedAttention(GroupedQueryAttention):
    def __init__(self, plain: GroupedQueryAttention, linear: Join) -> None:
        nn.Module.__init__(self)
        self.head_dim, self.groups, self.dropout = plain.head_dim, plain.groups, plain.dropout
        self.kv_heads, self.rotary = plain.k_proj.out_features // plain.head_dim, plain.rotary
        self.q_norm, self.k_norm = (
            None if norm is None else packed_norm(norm) for norm in (plain.q_norm, plain.k_norm)
        )
        self.qkv_proj = joined_linear([plain.q_proj, plain.k_proj, plain.v_proj], linear)
        self.register_module("o_proj", joined_linear([plain.o_proj], linear))
        self.project_in, self.project_out = self.qkv_proj.forward, self.o_proj.forward

    def forward(
        self,
        hidden_BTD: Tensor,
        cos_BT1K: Tensor,
        sin_BT1K: Tensor,
        mask: Mask | None = None,
        past: Past | None = None,
    ) -> Tensor:
        if past is None or hidden_BTD.shape[1] > 1:
            return super().forward(hidden_BTD, cos_BT1K, sin_BT1K, mask, past)
        assert mask is None or isinstance(mask, Tensor)
        q_B1HK, k_B1GK, v_B1GK = self.project(hidden_BTD, cos_BT1K, sin_BT1K)
        k_BGSK, v_BGSK = past.extend(k_B1GK.transpose(1, 2), v_B1GK.transpose(1, 2))
        mixed_BGJK = attend_once(q_B1HK.transpose(1, 2), k_BGSK, v_BGSK, mask)
        return self.project_out(mixed_BGJK.reshape(len(mixed_BGJK), 1, -1))

    def project(self, hidden_BTD: Tensor, cos_BT1K: Tensor, sin_BT1K: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = hidden_BTD.shape
        G, H = self.kv_heads, self.kv_heads * self.groups
        heads = self.project_in(hidden_BTD).view(B, T, -1, self.head_dim)
        if self.q_norm is not None:
            q_BTHK = self.placed(heads[:, :, :H], self.q_norm, cos_BT1K, sin_BT1K)
            return q_BTHK, self.placed(heads[:, :, H : H + G], self.k_norm, cos_BT1K, sin_BT1K), heads[:, :, H + G :]
        # Queries and keys are rotated by equal angles, so one call rotates both.
        turned = heads[:, :, : H + G]
        if self.rotary:
            turned = rotate(turned, cos_BT1K, sin_BT1K)
        return turned[:, :, :H], turned[:, :, H:], heads[:, :, H + G :]


class PackedSwiGLU(SwiGLU):
    def __init__(self, plain: SwiGLU, linear: Join) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj = joined_linear([plain.gate_proj, plain.up_proj], linear)
        self.register_module("down_proj", joined_linear([plain.down_proj], linear))
        self.widen, self.narrow = self.gate_up_proj.forward, self.down_proj.forward

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        gate, up = self.widen(hidden_BTD).chunk(2, dim=-1)
        return self.narrow(F.silu(gate).mul_(up))


def packed_norm(norm: nn.Module) -> nn.Module:
    assert isinstance(norm, RMSNorm)
    return PackedNorm(norm) if norm.weight.device.type == "cpu" and norm.weight.dtype != torch.float64 else norm


class PackedNorm(nn.Module):
    """RMSNorm with float32 sums in four operations, six for 16 bits. On a CPU `F.rms_norm` takes nine or more."""

    def __init__(self, plain: RMSNorm) -> None:
        super().__init__()
        D, gain_D = plain.weight.numel(), plain.weight.detach().float()
        # x / sqrt(|x|^2 / D + eps) = x sqrt(D) / sqrt(|x|^2 + D eps)
        self.gain_D: Tensor
        self.least: Tensor
        self.register_buffer("gain_D", gain_D * D**0.5, persistent=False)
        self.register_buffer("least", gain_D.new_tensor((D * plain.eps) ** 0.5), persistent=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        wide_BTD = hidden_BTD.float()
        length_BT1 = torch.linalg.vector_norm(wide_BTD, dim=-1, keepdim=True)
        return wide_BTD.div(length_BT1.hypot_(self.least)).mul_(self.gain_D).to(hidden_BTD.dtype)
