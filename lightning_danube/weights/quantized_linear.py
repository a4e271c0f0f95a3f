"""Frozen linear layers of bitsandbytes: in 4 bits, as a base for adapters (QLoRA; Dettmers et al. 2023, arXiv
2305.14314), and in 8 bits (LLM.int8; Dettmers et al. 2022, arXiv 2208.07339).

Only this file imports bitsandbytes, which takes a second: import this module only where it is needed.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from lightning_danube.model import Decoder
from lightning_danube.model.architecture import quantizable_layers

# On some processors bitsandbytes looks for a kernel on the hub at import, and warns that there is none.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# 8-bit products convert their inputs to 16 bits, whatever the model's type.
logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)

from bitsandbytes.functional import dequantize_4bit  # noqa: E402  (the lines above come first)
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit  # noqa: E402

BLOCK = 64
"""Number of 4-bit weights that share a scale."""
OUTLIERS_FROM = 6.0
"""For 8 bits: columns with an input beyond this value are multiplied in 16 bits, as in the paper."""


class FrozenLinear4bit(Linear4bit):
    """`Linear4bit` that trains correctly after an evaluation, and follows autocast.

    In evaluation on a CPU with bfloat16 instructions, bitsandbytes permanently converts the weights to a layout whose
    product has no gradient, with rounded scales. After a validation, training would silently continue with no gradient
    before the layer. bitsandbytes also computes in the type of its first input, whatever the autocast type is.
    """

    def __init__(self, layer: nn.Linear, quantization: str, *, double: bool = True) -> None:
        """`double`: the scales are stored in 8 bits, with scales themselves."""
        super().__init__(layer.in_features, layer.out_features, bias=False, quant_type=quantization, device="meta")
        weight: Any = Params4bit(layer.weight.data, quant_type=quantization, compress_statistics=double, module=self)
        # Moving the weight to its device quantizes it.
        self.weight = weight.to(layer.weight.device)
        self.register_parameter("bias", frozen_bias(layer))
        self.support_avx512bf16_for_cpu = False

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        # bitsandbytes supports 32 and 16 bits.
        self.compute_dtype = torch.float32 if x.dtype == torch.float64 else x.dtype
        self.compute_type_is_set = True
        result: Tensor = super().forward(x)
        return result

    def weight_values(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the dequantized weights, (N, D), by default in the type that they had before quantization."""
        weight: Any = self.weight
        values: Tensor = dequantize_4bit(weight.data, weight.quant_state)
        return values.to(dtype)

    def stored(self) -> list[Tensor]:
        """Returns all tensors that are needed to restore the layer."""
        weight: Any = self.weight
        return [weight.data, *weight.quant_state.as_dict(packed=True).values(), *biases(self)]


class FrozenLinear8bit(Linear8bitLt):
    """A linear layer whose weights are stored in 8 bits, with a scale per row."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(
            layer.in_features,
            layer.out_features,
            bias=False,
            has_fp16_weights=False,
            threshold=OUTLIERS_FROM,
            device="meta",
        )
        weight: Any = Int8Params(layer.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
        # Moving the weight to its device quantizes it.
        self.weight = weight.to(layer.weight.device)
        self.register_parameter("bias", frozen_bias(layer))

    def _scales(self) -> Tensor:
        weight: Any = self.weight
        # The first call moves the scales from the weight to the layer.
        scales_N = self.state.SCB if weight.SCB is None else weight.SCB
        assert scales_N is not None
        return scales_N

    def weight_values(self, dtype: torch.dtype) -> Tensor:
        """Returns the dequantized weights, (N, D)."""
        values: Tensor = self.weight.data.float() * (self._scales()[:, None] / 127)
        return values.to(dtype)

    def stored(self) -> list[Tensor]:
        """Returns all tensors that are needed to restore the layer."""
        return [self.weight.data, self._scales(), *biases(self)]


def frozen_bias(layer: nn.Linear) -> nn.Parameter | None:
    """Returns a copy of the bias, which keeps its type and does not train."""
    return None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)


def biases(layer: nn.Linear) -> list[Tensor]:
    return [] if layer.bias is None else [layer.bias.data]


def quantize_linear_layers(decoder: Decoder, quantization: str) -> None:
    """Quantizes the linear layers of the blocks to 4 bits, in place, with an 8-bit scale for each 64 weights.

    Embedding, head and norms do not change.

    Args:
        quantization: "nf4", whose steps are made for normally distributed weights.

    Raises:
        ValueError: a layer's input is not a multiple of 64; the decoder is then unchanged.
    """
    layers: dict[str, nn.Linear] = {}
    for name in quantizable_layers(decoder.config):
        layer = decoder.get_submodule(name)
        assert isinstance(layer, nn.Linear), name
        layers[name] = layer
    # bitsandbytes 0.50 on a CPU assumes that each row begins with a new block, so a block must not cross rows.
    if uneven := {layer.in_features for layer in layers.values() if layer.in_features % BLOCK}:
        raise ValueError(
            f"quantization {quantization} needs layers whose input is a multiple of {BLOCK}; this model has some of "
            f"{', '.join(map(str, sorted(uneven)))}: train its adapter on unquantized weights"
        )
    for name, layer in layers.items():
        _replace(decoder, name, FrozenLinear4bit(layer, quantization))
    # PEFT reads this attribute of the model before it inspects the layers.
    _mark(decoder, in_4bit=True)


def dequantize_linear_layers(decoder: Decoder) -> None:
    """Replaces the quantized layers by plain layers with the dequantized weights, in place."""
    for name, layer in list(decoder.named_modules()):
        if isinstance(layer, FrozenLinear4bit):
            _replace(decoder, name, dequantized(layer))
    _mark(decoder, in_4bit=False)


def dequantized(layer: FrozenLinear4bit) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(layer.weight_values())
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().clone())
    return plain


def _mark(decoder: Any, *, in_4bit: bool) -> None:
    decoder.is_loaded_in_4bit = in_4bit


def _replace(parent: nn.Module, name: str, layer: nn.Module) -> None:
    where, _, child = name.rpartition(".")
    setattr(parent.get_submodule(where), child, layer)
