"""One decoder over many devices: FSDP2 over the data-parallel replicas, tensor parallelism inside each of them.

Tensor parallelism divides the vocabulary of embedding and head, the attention heads and the width of the feed-forward.
Every device of a replica computes the residual stream and the norms. A block sums over the devices twice in each
direction. The loss reduces three numbers per token (loss.py), so no device has the logits of the whole vocabulary.
FSDP2 then shards the weights of each device over the replicas, block by block. In a hybrid layout (HSDP) only the
replicas of a group share one copy of the weights, and gradients are also summed over the groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .architecture import BLOCK_LAYERS
from .config import DecoderConfig
from .decoder import Decoder, RMSNorm

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Sharding:
    """How FSDP2 handles the weights.

    Args:
        products: type in which weights are gathered and multiplied, such as bfloat16 under autocast. The gradients are
            then summed over the replicas in float32. None: weights and gradients are sent in the type of the weights.
        gather_again: free the weights of a block after its forward pass and gather them again for the backward pass.
            Otherwise they stay from the forward pass to the backward pass: less communication, more memory.
    """

    products: torch.dtype | None = None
    gather_again: bool = True


WHOLE = Sharding()


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


def parallelize(decoder: Decoder, replicas: DeviceMesh, devices: DeviceMesh, sharding: Sharding = WHOLE) -> None:
    """Makes the decoder's weights distributed tensors, in place. Every process must call it with the same weights.

    Args:
        replicas: mesh of the data-parallel replicas. With two dimensions, (groups, replicas of a group), each group has
            its own copy of the weights.
        devices: one-dimensional mesh of the devices of one replica.

    Raises:
        ValueError: see `check_tensor_parallel`.
    """
    if devices.size() > 1:
        divide_matrices(decoder, devices)
    if replicas.size() > 1:
        deal_over_replicas(decoder, replicas, sharding)


def divide_matrices(decoder: Decoder, devices: DeviceMesh) -> None:
    """Applies tensor parallelism. Inputs and outputs of all modules stay plain tensors, because a block counts its
    heads by shape."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    check_tensor_parallel(decoder.config, devices.size())
    styles = {0: ColwiseParallel, 1: RowwiseParallel}
    block = {layer.name: styles[layer.shard_axis]() for layer in BLOCK_LAYERS if layer.shard_axis is not None}
    with_some_heads = tuple(f".{layer.name}" for layer in BLOCK_LAYERS if layer.each_head is not None)
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


def deal_over_replicas(decoder: Decoder, replicas: DeviceMesh, sharding: Sharding = WHOLE) -> None:
    """Applies FSDP2: gathers the weights of a block while the block runs.

    Embedding, last norm and head stay gathered from the forward pass to the end of the backward pass, because the loss
    multiplies by the head outside of any module.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    policy = MixedPrecisionPolicy()
    if sharding.products is not None:
        # Inputs keep their type: the residual stream stays float32, as under autocast on one device.
        policy = MixedPrecisionPolicy(sharding.products, torch.float32, cast_forward_inputs=False)
        residual = decoder.model.embed_tokens.weight.dtype
        decoder.model.embed_tokens.register_forward_hook(lambda module, inputs, output: output.to(residual))
    for layer in decoder.model.layers:
        fully_shard(layer, mesh=replicas, mp_policy=policy, reshard_after_forward=sharding.gather_again)
    fully_shard(decoder, mesh=replicas, mp_policy=policy, reshard_after_forward=False)
    register_fsdp_forward_method(decoder, "hidden_states")


@contextmanager
def gradients_kept_apart(module: nn.Module, *, in_full: bool) -> Iterator[None]:
    """Delays the sum of gradients over the replicas, for all micro-batches of an optimizer step but the last.

    Args:
        in_full: each device keeps the gradients of all weights until the last micro-batch. Otherwise each micro-batch's
            gradients are summed over the replicas that share a copy of the weights, and only the sum over the groups of
            a hybrid layout is delayed.
    """
    from torch.distributed.fsdp import FSDPModule

    sharded = [one for one in module.modules() if isinstance(one, FSDPModule)]

    def delay(delayed: bool) -> None:
        for one in sharded:
            if in_full:
                one.set_requires_gradient_sync(not delayed, recurse=False)
            else:
                one.set_requires_all_reduce(not delayed, recurse=False)

    delay(True)
    try:
        yield
    finally:
        delay(False)
