"""Properties of this machine: the number types it multiplies fast and exactly, its cores, its memory allocator.

The speed of a type is measured, not looked up. Processors without AVX-512 have no 16-bit products: there PyTorch
multiplies bfloat16 matrices up to 300 times slower than float32 matrices. A trial takes milliseconds and runs once per
process, at the first call.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

LARGEST_ERROR = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Allowed error of a matrix product, relative to its largest element, by type.

A float32 product has an error of 6e-7; computed in fewer bits, 3e-3 (bfloat16) or 4e-4 (TF32). The 16-bit types may
round their result (4e-3 and 5e-4), but not the sums inside the product.
"""

SIZES = {"cpu": (64, 128, 256, 512), "cuda": (1024, 4096), "mps": (512, 2048)}
"""Width of the square matrices of a trial. A trial stops after the first size that takes `SECONDS_OF_A_SIZE`."""
SECONDS_OF_A_SIZE = 1e-3
TRIES = 3
"""Tries of which the fastest counts. A CPU trial measures the CPU time of one thread, so other processes disturb it
little."""

WORTH_16_BITS = 1.2
"""Mixed precision also casts every weight in every step, so its products must be this much faster than float32's."""


@dataclass(frozen=True)
class ProductRate:
    """How fast and how exactly a device multiplies matrices of one type.

    Args:
        forward: FLOP/s of the product of a linear layer, x W^T.
        training: FLOP/s of a linear layer's three products in a training step. On some processors the other two are
            much slower than the first.
        exact: whether the error stays within `LARGEST_ERROR`.
    """

    forward: float
    training: float
    exact: bool


# --- trials -----------------------------------------------------------------------------------------------------------


@functools.cache
def product_rate(dtype: torch.dtype, device: str = "cpu") -> ProductRate:
    """Returns the measured rate of a type on a device ("cpu", "cuda", "cuda:1", "mps"). The first call takes 20 ms.

    float32 is measured as `exact_products_by_onednn` computes it.

    Raises:
        ValueError: the device cannot multiply this type.
    """
    kind = torch.device(device).type
    with _undisturbed(kind), exact_products_by_onednn() if kind == "cpu" else nullcontext():
        try:
            exact = _error(dtype, device) < LARGEST_ERROR[dtype]
            forward, training = _rates(dtype, device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"{device} does not multiply {_name(dtype)}: {str(error).splitlines()[0]}") from error
    return ProductRate(forward, training, exact)


def fastest_type(device: str = "cpu", *, training: bool = False) -> torch.dtype:
    """Returns the type with the fastest products among the types that are exact enough: float32, bfloat16 or float16.

    Args:
        training: compare the products of a training step; otherwise only those of the forward pass.
    """

    def speed(dtype: torch.dtype) -> float:
        try:
            rate = product_rate(dtype, device)
        except ValueError:
            return 0.0
        return rate.training if training else rate.forward

    exact = [one for one in (torch.bfloat16, torch.float16) if speed(one) and product_rate(one, device).exact]
    best = max(exact, key=speed, default=torch.float32)
    return best if speed(best) > WORTH_16_BITS * speed(torch.float32) else torch.float32


def type_under_autocast(dtype: torch.dtype, kind: str) -> torch.dtype:
    """Returns the type of products of `dtype` on a kind of device: autocast's if it is on there. float64 stays."""
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype


def onednn_stays_exact() -> bool:
    """Returns whether float32 products in "medium" precision keep float32's error on this processor. Measures it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        return _error(torch.float32, "cpu") < LARGEST_ERROR[torch.float32]
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def exact_products_by_onednn() -> Iterator[bool]:
    """Lets oneDNN multiply float32 matrices on a CPU if this keeps their exactness. Yields whether oneDNN is used.

    PyTorch uses the BLAS that it was built with, and uses oneDNN only if lower precision is allowed. If oneDNN
    nevertheless computes in float32, only the speed changes: 1.6 to 2 times on an EPYC. A precision that the user has
    chosen does not change.
    """
    before = torch.get_float32_matmul_precision()
    allowed = before == "highest" and onednn_stays_exact()
    if allowed:
        torch.set_float32_matmul_precision("medium")
    try:
        yield allowed
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _undisturbed(kind: str) -> Iterator[None]:
    """Turns off the caller's modes (autocast, gradients) during a trial, and limits a CPU to one thread.

    On a busy machine threads wait for each other, so a trial with all threads would measure the waiting.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), torch.autocast(kind, enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)


def _error(dtype: torch.dtype, device: str) -> float:
    """Returns the error of a matrix product with sums of 256 terms, relative to its largest element."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 256, generator=generator, device="cpu", dtype=torch.float32).to(dtype) for _ in range(2))
    expected = a.double() @ b.double().T
    found = (a.to(device) @ b.to(device).T).to("cpu").double()
    return float((found - expected).abs().max() / expected.abs().max())


def _rates(dtype: torch.dtype, device: str) -> tuple[float, float]:
    """Returns FLOP/s of a linear layer's forward product and of its three training products, the best of all sizes."""
    forward = training = 0.0
    for size in SIZES[torch.device(device).type]:
        x, w, grad = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(3))
        products = (functools.partial(torch.mm, *pair) for pair in ((x, w.T), (grad, w), (grad.T, x)))
        seconds = [_best_time(product, device) for product in products]
        flops = 2.0 * size**3
        forward, training = max(forward, flops / seconds[0]), max(training, 3 * flops / sum(seconds))
        if sum(seconds) > SECONDS_OF_A_SIZE:
            break
    return forward, training


def _best_time(product: Callable[[], Tensor], device: str) -> float:
    """Returns the seconds of the fastest try, after one try that compiles."""
    product()
    return min(_time(product, device) for _ in range(TRIES))


def _time(product: Callable[[], Tensor], device: str) -> float:
    kind = torch.device(device).type
    synchronize = torch.get_device_module(kind).synchronize if kind != "cpu" else None
    # Windows counts a thread's time in steps of 16 ms.
    of_a_thread = synchronize is None and time.get_clock_info("thread_time").resolution < SECONDS_OF_A_SIZE / 100
    clock = time.thread_time if of_a_thread else time.perf_counter
    if synchronize:
        synchronize()
    started = clock()
    product()
    if synchronize:
        synchronize()
    return max(clock() - started, 1e-9)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def widest_float(device: torch.device) -> torch.dtype:
    """Returns the widest type for sums: float64; float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


# --- questions of kernels, also from compiled code --------------------------------------------------------------------


def constant_in_compiled_code(function: Callable[P, R]) -> Callable[P, R]:
    """Works like `torch.compiler.assume_constant_result`, without importing PyTorch's compiler (1.4 CPU seconds)."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_in_compiled_code
def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Returns whether oneDNN has products of this type on this processor. Checks instructions, measures nothing."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


@constant_in_compiled_code
def onednn_multiplies_float32() -> bool:
    """Returns whether oneDNN multiplies float32 matrices now: `exact_products_by_onednn` or the user must allow it."""
    return torch.backends.mkldnn.is_available() and torch.get_float32_matmul_precision() != "highest"


def onednn_packs(dtype: torch.dtype) -> bool:
    """Returns whether oneDNN has a linear layer of this type whose weight is stored in oneDNN's packed layout."""
    operators = ("_linear_pointwise", "_reorder_linear_weight")
    return (
        dtype in (torch.float32, torch.bfloat16)
        and onednn_multiplies(dtype)
        and all(hasattr(torch.ops.mkldnn, name) for name in operators)
    )


def fbgemm_packs() -> bool:
    """Returns whether FBGEMM has a linear layer with float16 weights, float32 sums (PyTorch's x86 builds on AVX2)."""
    return "fbgemm" in torch.backends.quantized.supported_engines and torch.backends.quantized.engine in (
        "fbgemm",
        "x86",
    )


# --- cores and memory -------------------------------------------------------------------------------------------------


def usable_cores() -> int:
    """Returns the number of cores that this process may use; on macOS and Windows, the number of all cores."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_memory() -> int:
    """Returns the bytes of memory and swap that this process may use; the largest address if no limit is known.

    This is the least of the machine's memory and swap, the limits of its control groups (containers, SLURM), and the
    limit on its address space (`ulimit -v`).
    """
    limits = [sys.maxsize]
    with suppress(OSError, KeyError, ValueError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        kibibytes = {line[0]: int(line[1]) for line in lines}
        limits.append(1024 * (kibibytes["MemTotal:"] + kibibytes["SwapTotal:"]))
    if len(limits) == 1:  # not Linux
        with suppress(AttributeError, ValueError, OSError):
            limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limits += _limits_of_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    with suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows

        soft = resource.getrlimit(resource.RLIMIT_AS)[0]
        limits += [] if soft == resource.RLIM_INFINITY else [soft]
    return min(limits)


def _limits_of_groups(groups: Path, mounted: Path) -> list[int]:
    """Returns the limits on memory of this process's control groups and of the groups above them.

    Args:
        groups: /proc/self/cgroup, with lines such as "0::/user.slice/job" (version 2) or "9:memory:/job" (version 1).
        mounted: where the control groups are mounted.
    """
    limits = []
    with suppress(OSError, ValueError):
        for line in groups.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root, name = (mounted, "memory.max") if not controllers else (mounted / "memory", "memory.limit_in_bytes")
            group = root / path.strip("/")
            for folder in (group, *group.parents):
                with suppress(OSError, ValueError):  # "max", or outside what a container sees
                    limits.append(int((folder / name).read_text()))
                if folder == root:
                    break
    return limits


def check_memory(what: str, needed: int) -> None:
    """Checks that weights fit into the memory. The system ends a process that takes more, and no line says why.

    Args:
        what: the model, for the message.
        needed: bytes of its weights.

    Raises:
        ValueError: they are larger than the memory.
    """
    there = usable_memory()
    if needed > there:
        raise ValueError(
            f"{what} has {needed / 1e9:,.1f} GB of weights, more than the {there / 1e9:,.1f} GB of memory that this "
            "process may use: take a smaller model, or a machine with more memory"
        )


_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed memory in the process. Returns whether this took effect (Linux with glibc only).

    By default, glibc returns large blocks to the system and gets them again page by page in every step. Page faults on
    the logits take up to half of an eager training step. The cost of this setting: peak memory stays reserved.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # -1: never return the end of the heap to the system.
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 2**28}
    return all(mallopt(option, value) == 1 for option, value in settings.items())
