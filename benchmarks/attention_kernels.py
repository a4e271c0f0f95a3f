"""Milliseconds of causal attention, forward and backward, by each kernel that this device has for it.

    python benchmarks/attention_kernels.py --device cuda
    python benchmarks/attention_kernels.py --contexts 512 2048 --rows 2 --heads 6 --kv-heads 2 --head-dims 64

The defaults are the shapes of Danube3-500M (16 heads on 8 of 96 channels) and 4B (32 on 8 of 120). Kernels are those
that `F.scaled_dot_product_attention` chooses among, but for the one that holds every score, with grouped heads as they
are and repeated before; FlexAttention, compiled, on a GPU; and `blocked_attention` on a CPU. One that does not take a
shape says so. TFLOP/s count the lower triangle: 7 products, forward and backward, of rows x heads x context x context /
2 x channels x 2.

On a GPU the time is the device's between two events, on a CPU that of the process; medians of rounds after one that is
not counted, kernels in turns.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from machine import described, write_result
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_danube.allocator import keep_freed_memory
from lightning_danube.model.attention import repeat_heads
from lightning_danube.model.blocked_attention import blocked_attention
from lightning_danube.tables import markdown_table

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = [(16, 8, 96), (32, 8, 120)]
"""Query heads, key-value heads, channels of a head."""
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--heads", type=int, help="with --kv-heads and --head-dims: other shapes than the paper's")
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dims", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if len({arguments.heads is None, arguments.kv_heads is None, arguments.head_dims is None}) > 1:
        parser.error("--heads, --kv-heads and --head-dims go together")
    torch.set_num_threads(arguments.threads)
    if arguments.device == "cpu":
        keep_freed_memory()
    shapes = SHAPES
    if arguments.heads is not None:
        shapes = [(arguments.heads, arguments.kv_heads, channels) for channels in arguments.head_dims]
    rows = [
        [f"{heads} on {kv_heads} × {channels}", f"{context:,}", *row]
        for heads, kv_heads, channels in shapes
        for context in arguments.contexts
        for row in compared(heads, kv_heads, channels, context, arguments)
    ]
    head = ["heads × channels", "context", "kernel", "ms", "least to most", "TFLOP/s"]
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} thread(s)"
    lines = [
        described("torch"),
        f"{device}, {arguments.dtype}, {arguments.rows} row(s), {arguments.rounds} rounds, medians; load at the start "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        "",
        markdown_table(head, rows),
    ]
    write_result(f"attention-kernels-{arguments.device}", "\n".join(lines))


def kernels(device: str, groups: int) -> dict[str, Kernel]:
    """Name → causal attention of (B, H, T, K) queries on (B, G, T, K) keys and values."""
    causal = partial(F.scaled_dot_product_attention, is_causal=True)
    backends = {"PyTorch's flash": SDPBackend.FLASH_ATTENTION}
    if device == "cuda":
        backends = {
            "cuDNN": SDPBackend.CUDNN_ATTENTION,
            "flash": SDPBackend.FLASH_ATTENTION,
            "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
        }

    def chosen(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return causal(q, k, v, enable_gqa=True)

    def repeated(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return causal(q, repeat_heads(k, groups), repeat_heads(v, groups))

    found: dict[str, Kernel] = {}
    for name, backend in backends.items():
        found[f"{name}, grouped"] = partial(chosen, backend)
        found[f"{name}, repeated"] = partial(repeated, backend)
    if device == "cuda":
        found["FlexAttention"] = flex
    else:
        found["blocked_attention"] = blocked_attention
    return found


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed: Tensor = _flex(q.device.type)(q, k, v, block_mask=_causal_blocks(q.shape[2], q.device.type), enable_gqa=True)
    return mixed


@lru_cache
def _flex(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache
def _causal_blocks(context: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, query, key: query >= key, None, None, context, context, device=device)


def compared(heads: int, kv_heads: int, channels: int, context: int, arguments: argparse.Namespace) -> list[list[str]]:
    """A row a kernel."""
    generator = torch.Generator().manual_seed(0)

    def drawn(count: int) -> Tensor:
        drawn = torch.randn(arguments.rows, count, context, channels, generator=generator)
        return drawn.to(arguments.device, DTYPES[arguments.dtype]).requires_grad_()

    q, k, v = drawn(heads), drawn(kv_heads), drawn(kv_heads)
    seconds: dict[str, list[float] | str] = {}
    attend = kernels(arguments.device, heads // kv_heads)
    for number in range(arguments.rounds + 1):
        for name, kernel in attend.items():
            so_far = seconds.setdefault(name, [])
            if isinstance(so_far, str):
                continue
            try:
                took = time_of(kernel, q, k, v)
            except RuntimeError as error:
                seconds[name] = f"not for this shape: {str(error).splitlines()[0][:80]}"
                continue
            if number:
                so_far.append(took)
    flops = 7 * 2 * arguments.rows * heads * context * context / 2 * channels
    rows = []
    for name, times in seconds.items():
        if isinstance(times, str):
            rows.append([name, times, "", ""])
            continue
        median = statistics.median(times)
        rows.append(
            [
                name,
                f"{1e3 * median:.2f}",
                f"{1e3 * min(times):.2f} to {1e3 * max(times):.2f}",
                f"{flops / median / 1e12:.3g}",
            ]
        )
        print(f"{heads} on {kv_heads} x {channels}, {context} tokens, {name}: {1e3 * median:.2f} ms", flush=True)
    return rows


def time_of(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Seconds of one forward and backward pass."""
    if q.is_cuda:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        torch.autograd.grad(kernel(q, k, v).sum(), (q, k, v))
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    began = time.process_time()
    torch.autograd.grad(kernel(q, k, v).sum(), (q, k, v))
    return time.process_time() - began


if __name__ == "__main__":
    main()
