"""Accelerators with the makers' figures: dense 16-bit peak and memory.

The figures are from data sheets; figures "with sparsity" are halved. A device sold as 80 GB has about 80 GiB.
"""

from __future__ import annotations

import math
import os
import re
import sys
from dataclasses import dataclass

from lightning_danube.terminal import name_meant


@dataclass(frozen=True)
class Accelerator:
    """One kind of device.

    Args:
        name: name on a command line.
        flops: dense peak in FLOP/s of 16-bit matrix products that accumulate in 32 bits.
        memory: bytes of one device.
        price: price of one device per hour, in any currency; None if it was not stated.
    """

    name: str
    flops: float
    memory: int
    price: float | None = None


_GIB = 2**30
ACCELERATORS: dict[str, tuple[float, int]] = {
    "a100-40gb": (312e12, 40),
    "a100-80gb": (312e12, 80),
    "l4": (121e12, 24),
    "l40s": (362e12, 48),
    "rtx4090": (165e12, 24),
    "h100": (989e12, 80),
    "h200": (989e12, 141),
    "b200": (2250e12, 180),
    "mi300x": (1307e12, 192),
}
"""Name → dense bf16 FLOP/s, GiB. `h100` is the SXM version."""


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
        flops, gib = ACCELERATORS[name]
        return Accelerator(name, flops, gib * _GIB, hourly)
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

    from lightning_danube.device import product_rate, usable_cores

    types = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}
    rate = product_rate(types.get(precision.partition("-")[0], torch.float32)).training
    cores = usable_cores()
    return Accelerator(f"this CPU, {cores} cores", cores * rate / processes, _memory_of_this_machine() // processes)


def _memory_of_this_machine() -> int:
    """Returns the memory in bytes, or the size of the address space if the system does not report it (Windows)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return sys.maxsize


def _positive(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if number > 0 and math.isfinite(number) else None
