"""One decoder over many devices: FSDP2 over the data-parallel replicas, tensor parallelism inside each of them.

Tensor parallelism divides the vocabulary of embedding and head, the attention heads and the width of the feed-forward.
Every device of a replica computes the residual stream and the norms. A block sums over the devices twice in each
direction. The loss reduces three numbers per token (loss.py), so no device has the logits of the whole vocabulary.
FSDP2 then shards the weights of each device over the replicas, block by block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from .architecture import BLOCK_LAYERS
from .config import DecoderConfig
from .decoder import Decoder, RMSNorm

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def check_tensor_parallel(config: DecoderConfig, devices: int) -> None:
    """Checks that tensor parallelism can divide a decoder over this many devices.

    Raises:
        ValueError: the key-value heads, the feed-forward or the vocabulary do not divide evenly.
    """
    divided = {
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    for name, size in divided.items():
        if size % devices:
            fits = [n for n in range(2, devices) if not any(size % n for size in divided.values())]
            hint = f"{', '.join(map(str, fits))} would work" if fits else "use 1"
            raise ValueError(f"tensor_parallel_size {devices} does not divide {name} {size}: {hint}")


def parallelize(decoder: Decoder, replicas: DeviceMesh, devices: DeviceMesh) -> None:
    """Makes the decoder's weights distributed tensors, in place. Every process must call it with the same weights.

    Args:
        replicas: one-dimensional mesh of the data-parallel replicas.
        devices: one-dimensional mesh of the devices of one replica.

    Raises:
        ValueError: see `check_tensor_parallel`.
    """
    if devices.size() > 1:
        divide_matrices(decoder, devices)
    if replicas.size() > 1:
        deal_over_replicas(decoder, replicas)


def divide_matrices(decoder: Decoder, devices: DeviceMesh) -> None:
    """Applies tensor parallelism. Inputs and outputs of all modules stay plain tensors, because a block counts its
    heads by shape."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    check_tensor_parallel(decoder.config, devices.size())
    styles = {0: ColwiseParallel, 1: RowwiseParallel}
    block = {layer.name: styles[layer.shard_axis]() for layer in BLOCK_LAYERS if layer.shard_axis is not None}
    with_some_heads = tuple(f".{layer.name}" for layer in BLOCK_LAYERS if layer.sees_some_heads)
    for layer in decoder.model.layers:
        parallelize_module(layer, devices, block)
    for name, module in decoder.named_modules():
        if isinstance(module, RMSNorm):
            hold_on_all(module, devices, with_some_heads=name.endswith(with_some_heads))
    parallelize_module(decoder.model.embed_tokens, devices, RowwiseParallel(input_layouts=Replicate()))
    # The clone waits for the asynchronous result. Without it, compiled blocks would return a wrong gradient.
    decoder.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.clone())
    parallelize_module(decoder.lm_head, devices, ColwiseParallel(output_layouts=Replicate()))
    decoder.tie_weights()


def hold_on_all(norm: nn.Module, devices: DeviceMesh, *, with_some_heads: bool = False) -> None:
    """Replicates a norm's gain on every device, as a distributed tensor like all other weights.

    One optimizer and one gradient norm can then process all weights. The gain's gradient is equal on all devices,
    because the layers after the norm sum over the devices.

    Args:
        with_some_heads: the input is (B, T, heads of this device, K). Each device then has a part of the gradient, and
            the parts are summed.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module

    placement = Shard(2) if with_some_heads else Replicate()

    def take(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return (DTensor.from_local(inputs[0], mesh, (placement,), run_check=False), *inputs[1:])

    def give(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        return output.to_local()

    distribute_module(norm, devices, input_fn=take, output_fn=give)
    if with_some_heads:
        for gain in norm.parameters():
            gain.register_hook(lambda gradient: gradient.redistribute(placements=(Replicate(),)))


def deal_over_replicas(decoder: Decoder, replicas: DeviceMesh) -> None:
    """Applies FSDP2: gathers the weights of a block while the block runs.

    Embedding, last norm and head stay gathered from the forward pass to the end of the backward pass, because the loss
    multiplies by the head outside of any module.
    """
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for layer in decoder.model.layers:
        fully_shard(layer, mesh=replicas)
    fully_shard(decoder, mesh=replicas, reshard_after_forward=False)
    register_fsdp_forward_method(decoder, "hidden_states")
