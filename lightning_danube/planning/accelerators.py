"""Accelerators with the makers' figures: dense peaks, memory and its bandwidth, the link to other devices of the node.

The figures are from data sheets; figures "with sparsity" are halved. A device sold as 80 GB has about 80 GiB.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from lightning_danube.terminal import name_meant


@dataclass(frozen=True)
class Accelerator:
    """One kind of device.

    Args:
        name: name on a command line.
        flops: dense peak in FLOP/s of 16-bit matrix products that accumulate in 32 bits.
        memory: bytes of one device.
        price: price of one device per hour, in any currency; None if it was not stated.
        bandwidth: bytes per second that its memory reads or writes; None if it is not known.
        link: bytes per second that it sends to the other devices of its node, in one direction.
        float8: dense peak in FLOP/s of products of 8 bits; None if it has none.
        share: share of `flops` that a run reaches, where a step's time is not predicted by its parts.
    """

    name: str
    flops: float
    memory: int
    price: float | None = None
    bandwidth: float | None = None
    link: float = 32e9
    float8: float | None = None
    share: float = 0.4


CPU_SHARE = 0.74
"""Share of a CPU's products that a run reaches, the lowest that docs/speed.md has: 74 to 94 % of the ceiling."""

_GIB = 2**30
_FIGURES: dict[str, tuple[float, int, float, float, float | None]] = {
    # TFLOP/s in bf16, GiB, TB/s of memory, GB/s of the link in one direction, TFLOP/s in FP8
    "a100-40gb": (312, 40, 1.555, 300, None),
    "a100-80gb": (312, 80, 2.039, 300, None),
    "l4": (121, 24, 0.3, 32, 242),
    "l40s": (362, 48, 0.864, 32, 733),
    "rtx4090": (165, 24, 1.008, 32, 330),
    "h100": (989, 80, 3.35, 450, 1979),
    "h200": (989, 141, 4.8, 450, 1979),
    "b200": (2250, 180, 8.0, 900, 4500),
    "mi300x": (1307, 192, 5.3, 448, 2615),
}
"""`h100` is the SXM version. Cards without NVLink have PCIe 4.0 with 16 lanes as their link."""

ACCELERATORS: dict[str, Accelerator] = {
    name: Accelerator(
        name,
        tera * 1e12,
        gib * _GIB,
        bandwidth=bandwidth * 1e12,
        link=link * 1e9,
        float8=None if eight is None else eight * 1e12,
    )
    for name, (tera, gib, bandwidth, link, eight) in _FIGURES.items()
}


def parse_accelerator(text: str) -> Accelerator:
    """Parses "h100", "h100=2.50" (with a price per hour), or "400e12/64GiB" for a device that has no name here.

    Raises:
        ValueError: the accelerator is unknown, or the price is not valid.
    """
    name, equals, price = text.partition("=")
    hourly = _positive(price) if equals else None
    if equals and hourly is None:
        raise ValueError(f"--accelerator is {text!r}: the price of one device for an hour is a number, such as 2.50")
    if name in ACCELERATORS:
        return replace(ACCELERATORS[name], price=hourly)
    own = re.fullmatch(r"([\d.e+]+)/([\d.]+)GiB", name)
    stated = (_positive(own[1]), _positive(own[2])) if own else (None, None)
    if stated[0] is not None and stated[1] is not None:
        return Accelerator(name, stated[0], round(stated[1] * _GIB), hourly)
    hint = name_meant(name, ACCELERATORS).removesuffix("?")
    raise ValueError(f"--accelerator is {name!r}: {hint}, or state peak and memory, such as 400e12/64GiB")


def this_cpu(precision: str, processes: int = 1) -> Accelerator:
    """Returns one process's share of this machine. Measures matrix products in the precision, which takes milliseconds.

    Args:
        processes: number of processes that share the cores and the memory.
    """
    import torch

    from lightning_danube.device import product_rate, usable_cores, usable_memory

    types = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    rate = product_rate(types.get(precision.partition("-")[0], torch.float32)).training
    cores = usable_cores()
    memory = usable_memory() // processes
    return Accelerator(f"this CPU, {cores} cores", cores * rate / processes, memory, share=CPU_SHARE)


def _positive(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if number > 0 and math.isfinite(number) else None
