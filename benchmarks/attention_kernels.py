"""Milliseconds of causal attention, forward and backward, by each kernel that this device has for it; or of a decoding
step's.

    python benchmarks/attention_kernels.py --device cuda
    python benchmarks/attention_kernels.py --device cuda --decode
    python benchmarks/attention_kernels.py --contexts 512 2048 --rows 2 --heads 6 --kv-heads 2 --head-dims 64

The defaults are the shapes of Danube3-500M (16 heads on 8 of 96 channels) and 4B (32 on 8 of 120). Kernels are those
that `F.scaled_dot_product_attention` chooses among, but for the one that holds every score, with grouped heads as they
are and repeated before; FlexAttention, compiled, on a GPU; and `blocked_attention` on a CPU. One that does not take a
shape says so. TFLOP/s count the lower triangle: 7 products, forward and backward, of rows x heads x context x context /
2 x channels x 2.

On a GPU the time is the device's between two events, on a CPU that of the process; medians of rounds after one that is
not counted, kernels in turns.

With --decode: one query a head on so many cached tokens, forward alone: `attend_once` as decoding steps have it, with
the mask that fixed shapes need and without; PyTorch's kernels for grouped heads, without a mask; and sums of products,
compiled. GB/s count each key and value once. On a GPU 50 calls are recorded as a CUDA graph: no launch is timed.
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

from lightning_danube.device import keep_freed_memory
from lightning_danube.model.attention import attend_once, repeat_heads, sums_of_products
from lightning_danube.model.blocked_attention import blocked_attention
from lightning_danube.terminal import markdown_table

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CALLS = 50
"""Of a decoding step's attention in one measurement."""
SHAPES = [(16, 8, 96), (32, 8, 120)]
"""Query heads, key-value heads, channels of a head."""
Kernel = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--decode", action="store_true", help="a decoding step's")
    parser.add_argument("--contexts", type=int, nargs="+", help="default: 8192; of decoding 512, 2048 and 8192")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--heads", type=int, help="with --kv-heads and --head-dims: other shapes than the paper's")
    parser.add_argument("--kv-heads", type=int)
    parser.add_argument("--head-dims", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if len({arguments.heads is None, arguments.kv_heads is None, arguments.head_dims is None}) > 1:
        parser.error("--heads, --kv-heads and --head-dims go together")
    if arguments.contexts is None:
        arguments.contexts = [512, 2048, 8192] if arguments.decode else [8192]
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
    head = ["heads × channels", "context", "kernel", "ms", "least to most", "GB/s" if arguments.decode else "TFLOP/s"]
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {arguments.threads} thread(s)"
    lines = [
        described("torch"),
        f"{device}, {arguments.dtype}, {arguments.rows} row(s), {arguments.rounds} rounds, medians; load at the start "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores",
        "",
        markdown_table(head, rows),
    ]
    name = "decoding-attention" if arguments.decode else "attention-kernels"
    write_result(f"{name}-{arguments.device}", "\n".join(lines))


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


def decoding_kernels(device: str, groups: int, context: int) -> dict[str, Kernel]:
    """Name → attention of (B, H, 1, K) queries to all of (B, G, S, K) keys and values."""
    mask = torch.ones(1, 1, 1, context, dtype=torch.bool, device=device)

    def grouped(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    found: dict[str, Kernel] = {
        "attend_once, masked": lambda q, k, v: attend_once(q, k, v, mask),
        "attend_once": lambda q, k, v: attend_once(q, k, v, None),
        "flash, grouped": partial(grouped, SDPBackend.FLASH_ATTENTION),
    }
    if device == "cuda":
        found["cuDNN, grouped"] = partial(grouped, SDPBackend.CUDNN_ATTENTION)
    found["sums of products, compiled"] = _compiled_sums()
    return found


@lru_cache
def _compiled_sums() -> Any:
    return torch.compile(sums)


def sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    B, _, _, K = q.shape
    return sums_of_products(q.reshape(B, k.shape[1], -1, K), k, v, None)


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

    def drawn(count: int, tokens: int) -> Tensor:
        drawn = torch.randn(arguments.rows, count, tokens, channels, generator=generator)
        return drawn.to(arguments.device, DTYPES[arguments.dtype]).requires_grad_(not arguments.decode)

    q, k, v = drawn(heads, 1 if arguments.decode else context), drawn(kv_heads, context), drawn(kv_heads, context)
    seconds: dict[str, list[float] | str] = {}
    if arguments.decode:
        attend, measure = decoding_kernels(arguments.device, heads // kv_heads, context), time_of_step
    else:
        attend, measure = kernels(arguments.device, heads // kv_heads), time_of
    for number in range(arguments.rounds + 1):
        for name, kernel in attend.items():
            so_far = seconds.setdefault(name, [])
            if isinstance(so_far, str):
                continue
            try:
                took = measure(kernel, q, k, v)
            except RuntimeError as error:
                seconds[name] = f"not for this shape: {str(error).splitlines()[0][:80]}"
                continue
            if number:
                so_far.append(took)
    if arguments.decode:
        amount = (k.nbytes + v.nbytes) / 1e9
    else:
        amount = 7 * 2 * arguments.rows * heads * context * context / 2 * channels / 1e12
    rows, digits = [], 4 if arguments.decode else 2
    for name, times in seconds.items():
        if isinstance(times, str):
            rows.append([name, times, "", ""])
            continue
        median = statistics.median(times)
        rows.append(
            [
                name,
                f"{1e3 * median:.{digits}f}",
                f"{1e3 * min(times):.{digits}f} to {1e3 * max(times):.{digits}f}",
                f"{amount / median:.3g}",
            ]
        )
        print(f"{heads} on {kv_heads} x {channels}, {context} tokens, {name}: {1e3 * median:.{digits}f} ms", flush=True)
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


@torch.inference_mode()
def time_of_step(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Seconds of one of many forward passes."""
    if not q.is_cuda:
        began = time.process_time()
        for _ in range(CALLS):
            kernel(q, k, v)
        return (time.process_time() - began) / CALLS
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        kernel(q, k, v)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            kernel(q, k, v)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / CALLS


if __name__ == "__main__":
    main()
