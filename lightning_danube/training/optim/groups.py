"""Which parameters decay."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn


def parameter_groups(
    module: nn.Module, weight_decay: float, without: Collection[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Returns two groups of trainable parameters: matrices with decay; embeddings, norms and biases without.

    Args:
        module: the model.
        weight_decay: weight decay of the first group.
        without: parameters that belong to another optimizer.
    """
    embeddings = {
        id(parameter)
        for layer in module.modules()
        if isinstance(layer, nn.Embedding)
        for parameter in layer.parameters()
    }
    elsewhere = {id(parameter) for parameter in without}
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for parameter in module.parameters():
        if parameter.requires_grad and id(parameter) not in elsewhere:
            (decayed if parameter.ndim >= 2 and id(parameter) not in embeddings else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
