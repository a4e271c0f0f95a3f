"""Milliseconds for one token's matrices of SmolLM2-135M's blocks, by layout and number of rows.

    python benchmarks/layouts.py [--rows 1 2 8 32 128] [--threads 1]

120 matrices, 106 million weights, the best of ten: CPU time with one thread, else by the clock. To emulate a processor
with AVX2 alone set
ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 FBGEMM_ENABLE_INSTRUCTIONS=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from machine import described
from torch import Tensor, nn

from lightning_danube.device import fbgemm_packs, onednn_packs
from lightning_danube.generation.packing import SplitLinear

SHAPES = [(960, 576), (576, 576), (3072, 576), (576, 1536)]
LAYERS, MEASURED_LAYERS = 30, 10
Product = Callable[[Tensor, Any], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 8, 32, 128])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    plain = [torch.randn(shape) * 0.02 for _ in range(MEASURED_LAYERS) for shape in SHAPES]
    print(f"{described('torch')}, PyTorch uses {torch.backends.cpu.get_cpu_capability()}")
    print(f"{'rows':28}" + "".join(f"{rows:8d}" for rows in arguments.rows))
    with torch.inference_mode():
        for name, (product, weights, dtype) in layouts(plain).items():
            times = [milliseconds(product, weights, dtype, rows) for rows in arguments.rows]
            print(f"{name:28}" + "".join(f"{value:8.1f}" for value in times), flush=True)


def layouts(plain: list[Tensor]) -> dict[str, tuple[Product, list[Any], torch.dtype]]:
    """Name → the product, the weights in its layout, and the type of its inputs."""
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    onednn, quantized = torch.ops.mkldnn, torch.ops.quantized
    found: dict[str, tuple[Product, list[Any], torch.dtype]] = {
        "float32, F.linear": (F.linear, plain, float32),
        "float32, batch of products": (
            lambda x, layer: layer(x),
            [SplitLinear([linear_of(weight)]) for weight in plain],
            float32,
        ),
        "bfloat16, F.linear": (F.linear, [weight.bfloat16() for weight in plain], bfloat16),
        "bfloat16, converted": (
            lambda x, weight: F.linear(x, weight.float()),
            [weight.bfloat16() for weight in plain],
            float32,
        ),
        "float16, F.linear": (F.linear, [weight.half() for weight in plain], float16),
    }
    for dtype in (float32, bfloat16):
        if onednn_packs(dtype):
            found[f"{str(dtype).removeprefix('torch.')}, oneDNN"] = (
                lambda x, weight: onednn._linear_pointwise(x, weight, None, "none", [], ""),
                [onednn._reorder_linear_weight(weight.to(dtype), 16) for weight in plain],
                dtype,
            )
    if fbgemm_packs():
        found["float16, FBGEMM"] = (
            quantized.linear_dynamic_fp16,
            [quantized.linear_prepack_fp16(weight, None) for weight in plain],
            float32,
        )
    return found


def linear_of(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(*weight.shape[::-1], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def milliseconds(product: Product, weights: list[Any], dtype: torch.dtype, rows: int) -> float:
    """The time of all matrices of the model, the best of ten rounds over some of its layers."""
    inputs = {width: torch.randn(rows, width).to(dtype) for _, width in SHAPES}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = float("inf")
    for _ in range(10):
        began = clock()
        for weight, (_, width) in zip(weights, SHAPES * MEASURED_LAYERS, strict=True):
            product(inputs[width], weight)
        best = min(best, clock() - began)
    return best * 1e3 * LAYERS / MEASURED_LAYERS


if __name__ == "__main__":
    main()
