"""Float32 matrix products on a CPU by oneDNN where that costs no exactness.

PyTorch gives them to the BLAS it was built with, unless lower precision is allowed; then oneDNN gets them. On
processors whose oneDNN computes them in float32 all the same, only the speed is another: 1.6 to 2 times on an EPYC.
Where it would use 16-bit units, it is the user's to allow.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

LARGEST_ERROR = 1e-5
"""Of the largest element of the product below: float32 leaves 6e-7, 16 bits 3e-3."""


def onednn_stays_exact() -> bool:
    """Whether products in "medium" precision have float32's error here, by trying one."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        error = (a @ b - exact).abs().max() / exact.abs().max()
    finally:
        torch.set_float32_matmul_precision(before)
    return bool(error < LARGEST_ERROR)


@contextmanager
def exact_products_by_onednn() -> Iterator[bool]:
    """Lets oneDNN multiply, if it stays exact and the user has not chosen a precision; whether it does."""
    before = torch.get_float32_matmul_precision()
    allowed = before == "highest" and onednn_stays_exact()
    if allowed:
        torch.set_float32_matmul_precision("medium")
    try:
        yield allowed
    finally:
        torch.set_float32_matmul_precision(before)
