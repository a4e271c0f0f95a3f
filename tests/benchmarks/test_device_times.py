"""Rates of steps, peaks of GPUs, and the table of kernels."""

from typing import Any

import pytest
import torch


@pytest.fixture
def device_times(benchmarks_on_path: None) -> Any:
    import device_times

    return device_times


def test_rates_are_of_the_median_step(device_times: Any) -> None:
    # 1,000 tokens in 0.5 s are 2,000 a second; at 3e9 FLOPs each that is 6e12 of 12e12.
    found = device_times.speed([0.5, 0.25, 1.0], 1000, 3e9, 12e12)
    assert found == {
        "tokens_per_second": 2000,
        "least": 1000,
        "most": 4000,
        "seconds_a_step": 0.5,
        "steps": 3,
        "mfu": 0.5,
    }
    assert "mfu" not in device_times.speed([1.0], 10, 1e9, None)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA Unheard Of", None),
    ],
)
def test_the_peak_is_known_by_the_drivers_name(device_times: Any, name: str, peak: float | None) -> None:
    assert device_times.peak_of(name) == peak


def test_kernels_are_ordered_and_their_sum_is_the_last_row(device_times: Any) -> None:
    a = torch.ones(64, 64)
    with device_times.new_profiler() as profiler:
        for _ in range(4):
            a @ a
    *rows, whole = device_times.kernels_of(profiler, 2, most=3)
    assert [row["ms"] for row in rows] == sorted((row["ms"] for row in rows), reverse=True)
    assert whole["kernel"] == "all" and whole["ms"] >= sum(row["ms"] for row in rows) - 1e-9
    (product,) = (row for row in rows if row["kernel"] == "aten::mm")
    assert product["calls"] == 2 and 0 < product["share"] <= 1


def test_work_runs_once_more_than_it_is_timed(device_times: Any) -> None:
    calls: list[int] = []
    seconds, gib = device_times.with_peak(lambda: calls.append(1), "cpu", rounds=4)
    assert len(calls) == 5 and seconds >= 0 and gib is None
