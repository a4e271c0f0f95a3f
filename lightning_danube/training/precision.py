"""Chooses the precision of a run: the precision in the config, or the fastest one that is exact enough on the device.

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
"""Environment variable of a rank that rank zero has started: the precision of rank zero."""

MUCH_SLOWER = 3.0
"""A precision that is slower by this factor is not kept when a run resumes, and causes a warning when it is set."""

PRECISION_OF = {torch.float32: "32-true", torch.bfloat16: "bf16-mixed"}
"""The precisions of the automatic choice. 16-mixed scales its loss and can skip steps, so only the user chooses it."""

PRODUCTS_IN = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "bf16-true": torch.bfloat16,
    "16-mixed": torch.float16,
    "16-true": torch.float16,
    "64-true": torch.float64,
}
"""Precision → type of its matrix products."""

TF32 = "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"
"""PyTorch's environment variable that lets NVIDIA's GPUs multiply float32 matrices in TF32."""

DEVICES = {"cpu": "this processor", "cuda": "this GPU", "mps": "this GPU"}


@dataclass(frozen=True)
class Choice:
    """A precision, and the reason for it.

    Args:
        precision: the trainer's name of the precision.
        reason: why this precision was chosen, for the user.
    """

    precision: str
    reason: str


def kind_of_device(accelerator: Any) -> str:
    """Returns "cpu", "cuda", "mps" or another kind of device, from the accelerator in a config."""
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
    """Returns the fastest precision that is exact enough on a kind of device.

    Args:
        kind: kind of device, as from `kind_of_device`.
        trains: whether the task trains a model. A task that only measures a model computes in the type of its weights.
        before: the precision of a resumed run until now. It stays unless it is much slower here, because another
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
        # Not measured: a trial would take memory of the first GPU, which may not be the run's GPU.
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
    """Returns how many times slower a precision multiplies matrices in training than the reference. Measures it."""
    slow, fast = (product_rate(PRODUCTS_IN[name], device).training for name in (precision, reference))
    return fast / slow


def check_precision(precision: str, kind: str) -> None:
    """Checks that a kind of device can compute in a precision.

    Raises:
        ValueError: no device of this kind can compute in the precision.
    """
    if kind == "cpu" and precision == "16-mixed":
        # Lightning would use bf16-mixed instead.
        reason = "needs a GPU, and this run is on a CPU"
    elif precision.startswith("transformer-engine") and kind != "cuda":
        reason = f"needs an NVIDIA GPU, and this run is on {kind!r}"
    elif precision == "64-true" and kind == "mps":
        reason = "needs float64, which Apple's GPUs lack"
    else:
        return
    raise ValueError(f"trainer.precision {precision} {reason}: leave trainer.precision out, and the fastest is taken")


def warning_of(precision: str, device: torch.device) -> str | None:
    """Returns a one-line warning if the given precision is much slower on a device than the automatic choice."""
    dtype = PRODUCTS_IN.get(precision)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None  # float64 is set for its exactness
    best = choose(device.type).precision
    factor = _slowdown(precision, best, str(device))
    if factor < MUCH_SLOWER:
        return None
    # TF32 rounds the factors to 11 bits, so products in it are not what 32-true promises. bfloat16 is faster still.
    tf32 = f", or allow TF32 with {TF32}=1" if device.type == "cuda" and dtype == torch.float32 else ""
    return (
        f"warning: trainer.precision {precision} multiplies matrices {factor:,.0f} times slower than {best} on "
        f"{DEVICES.get(device.type, device.type)}: leave trainer.precision out (or set it to null){tf32}"
    )


def has_precision_plugin(plugins: Any) -> bool:
    """Returns whether a trainer plugin sets the precision. The trainer then accepts no name of a precision."""
    from lightning.pytorch.plugins import Precision

    listed = plugins if isinstance(plugins, list | tuple) else [plugins]
    classes = [pkgutil.resolve_name(one.class_path) if hasattr(one, "class_path") else type(one) for one in listed]
    return any(issubclass(one, Precision) for one in classes)
