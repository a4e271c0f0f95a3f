"""Linear layers of the blocks that multiply in 8 bits (FP8), by torchao.

Each product casts its two matrices to 8 bits with one scale each, computed from the matrix itself ("dynamic" scaling).
Weights, gradients and the optimizer keep their types, and parameters keep their names, so checkpoints and exports are
those of a run in bfloat16. Embedding, head, norms and attention stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_danube.extras import need

if TYPE_CHECKING:
    from lightning_danube.model import Decoder, DecoderConfig

MULTIPLE = 16
"""FP8 products take matrices whose sizes are multiples of 16."""
FIRST_CAPABILITY = (8, 9)
"""CUDA capability of the first GPUs with FP8 products: Ada (L4, RTX 4090); Hopper (H100) has 9.0."""
OFF = "set model.float8 to false"


def check_float8(config: DecoderConfig, precision: str, device: torch.device, tensor_parallel: int) -> None:
    """Checks that a run can multiply in FP8.

    Raises:
        ValueError: torchao is not installed, the device has no FP8 products, the precision is not bfloat16's, the
            matrices are divided over devices, or a size is not a multiple of 16.
    """
    need("float8", "model.float8")
    if device.type != "cuda":
        raise ValueError(f"model.float8 needs a GPU with FP8 products, and this run is on {device.type!r}: {OFF}")
    capability = torch.cuda.get_device_capability(device)
    if capability < FIRST_CAPABILITY:
        raise ValueError(
            f"model.float8 needs a GPU with FP8 products (H100, H200, L4, L40S, RTX 4090 or newer), and "
            f"{torch.cuda.get_device_name(device)} has none: {OFF}"
        )
    if not precision.startswith("bf16"):
        raise ValueError(f"model.float8 needs trainer.precision bf16-mixed, and it is {precision}: change it, or {OFF}")
    if tensor_parallel > 1:
        raise ValueError(
            f"model.float8 does not go with tensor parallelism, here over {tensor_parallel} devices: {OFF}"
        )
    assert config.head_dim is not None  # resolved by the config
    sizes = {
        "data.context_length": config.max_position_embeddings,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads × head_dim": config.num_attention_heads * config.head_dim,
        "num_key_value_heads × head_dim": config.num_key_value_heads * config.head_dim,
    }
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise ValueError(f"model.float8 needs sizes that are multiples of {MULTIPLE}, and {name} is {size}: {OFF}")


def multiply_in_float8(decoder: Decoder, *, emulate: bool = False) -> None:
    """Replaces the linear layers of the blocks, in place; the parameters stay the same objects.

    Args:
        emulate: round to 8 bits, then multiply in the type of the activations. For tests on a CPU.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=emulate)
    for block in decoder.model.layers:
        convert_to_float8_training(block, config=config, module_filter_fn=_is_linear)


def _is_linear(module: nn.Module, name: str) -> bool:
    return type(module) is nn.Linear
