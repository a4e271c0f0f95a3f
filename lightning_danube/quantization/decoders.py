"""Decoders of this project whose matrices are held in fewer bits."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_danube.device import widest_float
from lightning_danube.model import Decoder
from lightning_danube.model.architecture import quantizable_layers
from lightning_danube.quantization.levels import Level
from lightning_danube.quantization.measured import Content


class QuantizedLayer(Protocol):
    """The interface that the layers of all methods share."""

    def weight_values(self, dtype: torch.dtype) -> Tensor: ...


class QuantizedEmbedding(nn.Module):
    """An embedding with a quantized matrix, which is unpacked in each call.

    `weight` is empty: a cache reads from it the type and the device to compute in.
    """

    weight: Tensor

    def __init__(self, matrix: nn.Module, weight: Tensor) -> None:
        super().__init__()
        self.matrix = matrix
        self.register_buffer("weight", weight.new_empty(0))

    def forward(self, ids_BT: Tensor) -> Tensor:
        return F.embedding(ids_BT, cast(QuantizedLayer, self.matrix).weight_values(self.weight.dtype))


class RunningDecoder:
    """A decoder of this project that returns logits."""

    def __init__(self, decoder: Decoder, content: Content) -> None:
        self.decoder, self.content = decoder.eval(), content

    def logits(self, ids_BT: Tensor, first: int) -> Tensor:
        """Returns logits, (B, T - first, V), for the positions from `first` on."""
        return self.decoder.lm_head(self.decoder.hidden_states(ids_BT)[:, first:])

    def close(self) -> None:
        pass


def check_finite(decoder: Decoder) -> None:
    """Checks that all weights are finite.

    Raises:
        ValueError: a weight is not finite; the message names the tensor.
    """
    for name, parameter in decoder.named_parameters():
        # A sum is not finite if any value is not. The widest type keeps a sum of finite values from overflowing.
        if not bool(parameter.sum(dtype=widest_float(parameter.device)).isfinite()):
            raise ValueError(f"{name} has weights that are not finite: the model is damaged, nothing is measured")


def full_decoder(decoder: Decoder) -> RunningDecoder:
    """Returns the unquantized decoder, ready to return logits."""
    return RunningDecoder(decoder, content_of(decoder, Counter()))


def quantized_decoder(decoder: Decoder, level: Level) -> RunningDecoder:
    """Returns a quantized copy of a decoder. The original does not change; both share all tensors not quantized.

    A matrix that the method cannot quantize keeps its type, and counts as a fallback.

    Raises:
        ValueError: the method is not installed, or must not round a tensor; the message names the tensor.
    """
    # Parameters are shared, because deepcopy looks in its memo first.
    quantized = copy.deepcopy(decoder, {id(parameter): parameter for parameter in decoder.parameters()})
    build, block = _layer_builder(level)
    fallbacks: Counter[str] = Counter()
    for name, layer in _matrices(quantized, level.embeddings):
        if layer.weight.shape[1] % block:
            fallbacks[str(layer.weight.dtype).removeprefix("torch.")] += 1
            continue
        try:
            small = build(layer.weight, getattr(layer, "bias", None))
        except ValueError as error:
            raise ValueError(f"{name}.weight: {error}") from None
        if name == "lm_head" and decoder.config.tie_word_embeddings:
            quantized.model.register_module("embed_tokens", QuantizedEmbedding(small, layer.weight))
        if name == "model.embed_tokens":
            small = QuantizedEmbedding(small, layer.weight)
        where, _, child = name.rpartition(".")
        setattr(quantized.get_submodule(where), child, small)
    return RunningDecoder(quantized, content_of(quantized, fallbacks))


def _matrices(decoder: Decoder, embeddings: bool) -> Iterator[tuple[str, Any]]:
    for name in quantizable_layers(decoder.config):
        yield name, decoder.get_submodule(name)
    if embeddings:
        if not decoder.config.tie_word_embeddings:
            yield "model.embed_tokens", decoder.model.embed_tokens
        yield "lm_head", decoder.lm_head


Build = Callable[[Tensor, Tensor | None], nn.Module]
"""Makes a quantized layer from a matrix and its bias, if it has one."""


def _layer_builder(level: Level) -> tuple[Build, int]:
    """Returns a function that quantizes a linear layer, and the number that its columns must be a multiple of."""
    if level.method in ("hqq", "rounding"):
        from lightning_danube.quantization.grouped import GroupedLinear

        bits, group = level.group
        optimize = level.method == "hqq"
        return lambda weight, bias: GroupedLinear(weight, bits, group, optimize=optimize, bias_N=bias), group
    assert level.method == "bitsandbytes"
    from lightning_danube.weights.quantized_linear import BLOCK, FrozenLinear4bit, FrozenLinear8bit

    if level.type == "int8":
        return lambda weight, bias: FrozenLinear8bit(_linear(weight, bias)), 1
    return lambda weight, bias: FrozenLinear4bit(_linear(weight, bias), level.type, double=level.double), BLOCK


def _linear(weight_ND: Tensor, bias_N: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight_ND.shape[1], weight_ND.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight_ND.detach(), requires_grad=False)
    if bias_N is not None:
        linear.bias = nn.Parameter(bias_N.detach(), requires_grad=False)
    return linear


def content_of(decoder: Decoder, fallbacks: Counter[str]) -> Content:
    """Returns the size of all tensors, as they are stored in memory and would be in a file."""
    return Content(
        tensor_bytes=sum(tensor.nbytes for tensor in _tensors(decoder)),
        weights=decoder.config.parameters,
        fallbacks=dict(fallbacks),
    )


def _tensors(decoder: Decoder) -> Iterable[Tensor]:
    stored: dict[int, Tensor] = {}
    for module in decoder.modules():
        own: Iterable[Tensor]
        if (stored_by := getattr(type(module), "stored", None)) is not None:
            own = stored_by(module)
        else:
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for tensor in own:
            # Shared tensors, such as tied ones, count once. `data` returns a new object each time, but the address of
            # its memory stays equal.
            stored.setdefault(tensor.data_ptr(), tensor)
    return stored.values()
