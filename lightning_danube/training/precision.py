"""Which precision a run computes in: the one that is set, or the fastest that is exact enough on its device.

The names are those of Lightning's trainer: in "bf16-mixed" the weights are float32 and matrices are multiplied in
bfloat16; in "32-true" everything is float32.
"""

from __future__ import annotations

import os
import pkgutil
from dataclasses import dataclass
from typing import Any

import torch

from lightning_danube.device import fastest_type, onednn_stays_exact, product_rate

RANK_ZEROS = "LIGHTNING_DANUBE_PRECISION"
"""Environment variable of a rank that rank zero has started: the precision that rank zero computes in."""

MUCH_SLOWER = 3.0
"""A precision that is slower by this factor is not kept when a run goes on, and is told when it is set."""

PRECISION_OF = {torch.float32: "32-true", torch.bfloat16: "bf16-mixed"}
"""The precisions that are chosen. 16-mixed scales its loss and can skip steps, so only the user chooses it."""

PRODUCTS_IN = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "16-true": torch.float16,
    "64-true": torch.float64,
}
"""Precision → the type in which it multiplies matrices."""

DEVICES = {"cpu": "this processor", "cuda": "this GPU", "mps": "this GPU"}


@dataclass(frozen=True)
class Choice:
    """
    Args:
        precision: as the trainer calls it.
        reason: why, to print beside it.
    """

    precision: str
    reason: str


def kind_of_device(accelerator: Any) -> str:
    """ "cpu", "cuda", "mps" or another kind, for what a config says of the accelerator."""
    if accelerator == "auto":
        # `plan` chooses a precision without Lightning, whose import takes seconds.
        from lightning.fabric.utilities.device_parser import _select_auto_accelerator

        return str(_select_auto_accelerator())
    if accelerator == "gpu":
        return "mps" if torch.backends.mps.is_available() else "cuda"
    if isinstance(accelerator, str):
        return accelerator
    # A class, or its path and arguments: CPUAccelerator.
    name = getattr(accelerator, "class_path", type(accelerator).__name__)
    return str(name).rpartition(".")[2].removesuffix("Accelerator").lower()


def choose(kind: str, *, trains: bool = True, before: str | None = None) -> Choice:
    """The fastest precision that is exact enough on a kind of device.

    Args:
        kind: of device, as `kind_of_device` says.
        trains: whether the task trains a model. A task that only measures one computes in the type of its weights.
        before: the precision that a run which goes on had until now. It stays unless it is much slower here, as another
            precision changes the loss curve.
    """
    if not trains:
        return Choice("32-true", "this task computes in the type of its weights")
    if RANK_ZEROS in os.environ:
        return Choice(os.environ[RANK_ZEROS], "as on rank 0")
    precision, reason = _fastest(kind)
    if before is None or before not in PRECISION_OF.values():
        return Choice(precision, reason)
    if before != precision and _slowdown(before, precision, kind) < MUCH_SLOWER:
        return Choice(before, f"as before; a new run would take {precision} here")
    return Choice(precision, reason)


def _fastest(kind: str) -> tuple[str, str]:
    if kind == "cpu":
        return PRECISION_OF.get(fastest_type(training=True), "32-true"), _rates("cpu")
    if kind == "cuda" and torch.cuda.is_available():
        # Asked, not measured: a trial would take memory of the first GPU, which may not be the run's.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", "this GPU has bfloat16 products"
        return "32-true", "this GPU has no bfloat16 products; 16-mixed may be faster"
    if kind == "mps":
        return "32-true", "16-bit products are hardly faster on this GPU"
    return "32-true", f"nothing is known of the accelerator {kind!r}"


def _rates(kind: str) -> str:
    rates = {dtype: product_rate(dtype, kind).training / 1e9 for dtype in PRECISION_OF}
    by = " (by oneDNN)" if onednn_stays_exact() else ""
    return (
        f"one core multiplies {rates[torch.float32]:,.3g} GFLOP/s in float32{by}, "
        f"{rates[torch.bfloat16]:,.3g} in bfloat16"
    )


def _slowdown(precision: str, reference: str, device: str) -> float:
    """How many times slower one precision multiplies matrices in training than another. Measured."""
    slow, fast = (product_rate(PRODUCTS_IN[name], device).training for name in (precision, reference))
    return fast / slow


def check_precision(precision: str, kind: str) -> None:
    """
    Raises:
        ValueError: no device of this kind computes in a precision.
    """
    if kind == "cpu" and precision == "16-mixed":
        # Lightning would take bf16-mixed instead.
        reason = "needs a GPU, and this run is on a CPU"
    elif precision.startswith("transformer-engine") and kind != "cuda":
        reason = f"needs an NVIDIA GPU, and this run is on {kind!r}"
    elif precision == "64-true" and kind == "mps":
        reason = "needs float64, which Apple's GPUs lack"
    else:
        return
    raise ValueError(f"trainer.precision {precision} {reason}: leave trainer.precision out, and the fastest is taken")


def warning_of(precision: str, device: torch.device) -> str | None:
    """One line if a precision that was set is much slower on a device than the one that would be chosen."""
    dtype = PRODUCTS_IN.get(precision)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None  # float64 is set for its exactness
    best = choose(device.type).precision
    factor = _slowdown(precision, best, str(device))
    if factor < MUCH_SLOWER:
        return None
    return (
        f"warning: trainer.precision {precision} multiplies matrices {factor:,.0f} times slower than {best} on "
        f"{DEVICES.get(device.type, device.type)}: leave trainer.precision out (or set it to null)"
    )


def has_precision_plugin(plugins: Any) -> bool:
    """Whether one of the trainer's plugins decides the precision. The trainer then takes no name of a precision."""
    from lightning.pytorch.plugins import Precision

    listed = plugins if isinstance(plugins, list | tuple) else [plugins]
    classes = [pkgutil.resolve_name(one.class_path) if hasattr(one, "class_path") else type(one) for one in listed]
    return any(issubclass(one, Precision) for one in classes)
