"""Computes llama.cpp's importance matrix, which weighs each matrix's columns, from the decoder's forward passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lightning_danube.device import widest_float
from lightning_danube.model import Decoder
from lightning_danube.weights.gguf.files import gguf_names

WINDOW = 512


@torch.no_grad()
def importance_matrix(decoder: Decoder, ids: Tensor) -> dict[str, NDArray[np.float32]]:
    """Returns the name of each tensor in a GGUF file → mean square of the inputs to each of its columns, on a text.

    The q and k projections have another order of rows in GGUF than here, but the same order of columns.

    Args:
        ids: (tokens,), read in windows of 512.

    Raises:
        ValueError: there are no tokens.
    """
    if not len(ids):
        raise ValueError(
            "an importance matrix needs text, and none is left after the measured text: lower data.max_tokens"
        )
    sums: dict[str, Tensor] = {}
    names = gguf_names(decoder.config)

    def collector(name: str) -> Callable[..., None]:
        def collect(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            (x,) = inputs
            squares_D = x.detach().to(widest_float(x.device)).flatten(0, -2).square().sum(0)
            sums[name] = sums.get(name, 0) + squares_D

        return collect

    handles = [
        module.register_forward_hook(collector(f"{name}.weight"))
        for name, module in decoder.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in names
    ]
    try:
        for part in ids.to(decoder.model.embed_tokens.weight.device).split(WINDOW):
            decoder(part[None])
    finally:
        for handle in handles:
            handle.remove()
    return {names[name]: (total / len(ids)).float().cpu().numpy() for name, total in sums.items()}
