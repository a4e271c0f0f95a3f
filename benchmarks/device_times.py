"""Times and memory of work on a device, and the kernels that it ran."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_danube.planning.accelerators import ACCELERATORS

GIB = 2**30


def median_seconds(work: Callable[[], Any], rounds: int = 5, device: str = "cuda") -> float:
    """Returns the median time of some calls after one that does not count: the device's on a GPU."""
    work()
    seconds = []
    for _ in range(rounds):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
            seconds.append(begin.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def with_peak(work: Callable[[], Any], device: str, rounds: int = 3) -> tuple[float, float | None]:
    """Returns seconds of a call, and how many GiB more than before were in use at most; None on a CPU."""
    if device != "cuda":
        return median_seconds(work, rounds, device), None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(work, rounds, device)
    return seconds, (torch.cuda.max_memory_allocated() - before) / GIB


def product_tflops(size: int = 8192) -> float:
    """Returns TFLOP/s of a large bf16 product of random matrices: what this GPU can reach."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b) / 1e12


def copy_gb_per_second() -> float:
    """Returns bytes read and written a second by a copy within the GPU's memory, in GB."""
    source = torch.randn(2**28, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source)) / 1e9


def peak_flops() -> float | None:
    """Returns the dense bf16 peak of this GPU in FLOP/s; None if it is not known, and on a CPU."""
    return peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def peak_of(name: str) -> float | None:
    """Returns the dense bf16 peak of a GPU by the name that its driver tells; None if it is not known."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower())
    # a100-40gb and a100-80gb are the same chip. The longest name: an L40S is no L4.
    known = {key.partition("-")[0]: one.flops for key, one in ACCELERATORS.items()}
    fitting = [key for key in known if key in plain]
    return known[max(fitting, key=len)] if fitting else None


def speed(seconds: Sequence[float], tokens: float, flops_per_token: float, peak: float | None) -> dict[str, Any]:
    """Returns the rates of steps that took so long; `mfu` counts the whole square of attention, as `fit` does."""
    median = statistics.median(seconds)
    rates = {
        "tokens_per_second": tokens / median,
        "least": tokens / max(seconds),
        "most": tokens / min(seconds),
        "seconds_a_step": median,
        "steps": len(seconds),
    }
    return rates if peak is None else {**rates, "mfu": tokens / median * float(flops_per_token) / peak}


def new_profiler() -> Any:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities)


def kernels_of(profiler: Any, steps: int, most: int = 14) -> list[dict[str, Any]]:
    """Returns the kernels that took longest, for each of so many steps: on a GPU the device's, on a CPU the operators.

    The last row is the sum over all kernels. A step of a GPU that lasts longer than that was waiting for the host.
    """
    averages = profiler.key_averages()
    on_gpu = any(entry.device_type == torch.autograd.DeviceType.CUDA for entry in averages)
    found = [
        (entry.self_device_time_total if on_gpu else entry.self_cpu_time_total, entry.count, entry.key)
        for entry in averages
        # Ranges that somebody has named cover kernels that stand here by themselves.
        if (not on_gpu or entry.device_type == torch.autograd.DeviceType.CUDA)
        and not entry.key.startswith(("ProfilerStep", "[pl]", "Optimizer.", "## ", "Activity Buffer"))
    ]
    whole = sum(time for time, _, _ in found) or 1
    rows = [
        {"kernel": key[:90], "ms": time / 1e3 / steps, "share": time / whole, "calls": count / steps}
        for time, count, key in sorted(found, reverse=True)[:most]
    ]
    return [
        *rows,
        {"kernel": "all", "ms": whole / 1e3 / steps, "share": 1.0, "calls": sum(f[1] for f in found) / steps},
    ]
