"""Linear layers in the order in which a CPU's kernels read them: for decoders that only generate.

A decoding step at batch 1 reads every weight once and computes next to nothing, so what counts is how fast a kernel
streams a matrix. Through F.linear that is 17 GB/s on one core (EPYC, AVX-512; it calls MKL for float32, and oneDNN for
bfloat16 with the matrix as it lies). oneDNN streams a matrix in its own blocked layout at 32 GB/s in float32 and at 38
in bfloat16. torch.compile does the same when it freezes a model, with a C++ compiler at hand; the operators are those.
"""

import torch
from torch import Tensor, nn

OPERATORS = torch.ops.mkldnn


class PackedLinear(nn.Module):
    """A linear layer that can neither be trained nor saved."""

    def __init__(self, linear: nn.Linear, rows: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else linear.bias.detach()
        # A plain attribute: the layout is opaque, there is nothing that a state_dict could take.
        self.packed = OPERATORS._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        packed: Tensor = OPERATORS._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return packed


def pack_linears(module: nn.Module, rows: int = 1) -> int:
    """Replace the plain linear layers inside `module` by packed ones, where this machine gains by that: on the CPU, in
    float32 and bfloat16. The number of layers replaced.

    Each weight is let go when its packed copy is there, so memory stays the same but for a tied embedding, which is
    still needed as it is. `rows` is how many tokens a step has at once: any number works, this one works best.
    """
    replaced = 0
    for name, child in list(module.named_children()):
        # Not subclasses: quantized layers and adapters compute something else.
        if type(child) is nn.Linear and can_pack(child.weight):
            setattr(module, name, PackedLinear(child, rows))
            replaced += 1
        else:
            replaced += pack_linears(child, rows)
    return replaced


def can_pack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if not hasattr(OPERATORS, "_linear_pointwise") or not hasattr(OPERATORS, "_reorder_linear_weight"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(OPERATORS._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
