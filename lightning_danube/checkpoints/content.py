"""What a checkpoint may hold: tensors of plain, finite numbers under names.

A complete file may come from another program, or from a run that had diverged. PyTorch would copy the real part
of complex weights, skip the missing values of meta weights, and train on with NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


def check_content(content: Mapping[str, Any], source: Path) -> None:
    """Checks the weights and the optimizers' states of a checkpoint in Lightning's layout.

    Raises:
        ValueError: they are missing, or no run could resume from them.
    """
    check_plain(content.get("state_dict"), source)
    states = content.get("optimizer_states", [])
    if not isinstance(states, list):
        raise ValueError(f"{source}: its optimizer_states are a {type(states).__name__}, not a list")
    for state in states:
        values = state.get("state") if isinstance(state, Mapping) else None
        if not isinstance(values, Mapping) or not all(isinstance(one, Mapping) for one in values.values()):
            raise ValueError(f"{source}: the state of its optimizer is not of torch's layout")
        for number, of_one in values.items():
            tensors = {key: value for key, value in of_one.items() if isinstance(value, Tensor)}
            check_plain(tensors, source, f"optimizer's value of parameter {number},", floats=False)


def check_plain(tensors: Any, source: Path, what: str = "weight", *, floats: bool = True) -> None:
    """
    Args:
        what: what one tensor is, for the message.
        floats: whether integers are refused: PyTorch would copy quantized weights as if they were the numbers.

    Raises:
        ValueError: it is not a mapping of names to tensors, or a tensor is not one of plain, finite numbers.
    """
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{source} is not a checkpoint of a run: it has no mapping of names to weights (state_dict)")
    for name, tensor in tensors.items():
        if wrong := _wrong(tensor, floats):
            raise ValueError(f"{source}: its {what} {name} {wrong}")


def _wrong(tensor: Any, floats: bool) -> str | None:
    if not isinstance(tensor, Tensor):
        return f"is a {type(tensor).__name__}, not a tensor"
    if tensor.is_meta:
        return "has a shape and no values: it was saved from the device meta"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
        kind = "complex" if tensor.is_complex() else "quantized" if tensor.is_quantized else "sparse"
        return f"is {kind}: save it as a plain tensor of numbers"
    if floats and not tensor.is_floating_point():
        return f"holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers"
    return None if all_finite(tensor) else f"{NOT_FINITE}; take an earlier checkpoint"


def check_restored(optimizer: Optimizer) -> None:
    """Checks the state that a checkpoint gave an optimizer. A fused step would read past the end of a smaller tensor.

    Raises:
        ValueError: a value that is not a single number has another shape than its parameter, or a parameter lacks a
            value that the others of its group have.
    """
    for group in optimizer.param_groups:
        states = [
            (parameter, optimizer.state[parameter]) for parameter in group["params"] if parameter in optimizer.state
        ]
        wanted = {key for _, state in states for key in state}
        for parameter, state in states:
            fits = [
                isinstance(one, Tensor) and (one.shape == parameter.shape or one.numel() == 1) for one in state.values()
            ]
            if state.keys() != wanted or not all(fits):
                raise ValueError(
                    "the checkpoint's optimizer does not fit its weights: another program wrote it, or it was changed; "
                    "name another checkpoint, or begin a new run without --ckpt_path"
                )


NOT_FINITE = "holds NaN or infinity, as after a run that has diverged"


def all_finite(tensor: Tensor) -> bool:
    """Returns whether the part of a tensor that this process has is finite. Makes no copy. True for the device meta."""
    local = tensor.detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    if local.is_meta or not local.is_floating_point() or local.element_size() < 2 or not local.numel():
        return True
    return bool(torch.stack(torch.aminmax(local)).isfinite().all())
