"""Figures of accelerators, and a process's share of this machine."""

from types import SimpleNamespace

import pytest
import torch

from lightning_danube.planning.accelerators import ACCELERATORS, this_cpu


def test_peaks_are_those_of_dense_products() -> None:
    """Data sheets of the makers give twice as much for products "with sparsity"."""
    with_sparsity = {"a100-80gb": 624e12, "h100": 1979e12, "h200": 1979e12, "l4": 242e12, "b200": 4500e12}
    for name, flops in with_sparsity.items():
        assert ACCELERATORS[name].flops == pytest.approx(flops / 2, rel=1e-3)
    assert ACCELERATORS["h200"].flops == ACCELERATORS["h100"].flops


def test_products_in_8_bits_are_twice_as_fast_where_there_are_any() -> None:
    for name, one in ACCELERATORS.items():
        assert one.name == name and one.bandwidth is not None and one.link > 0
        assert one.float8 is None or one.float8 == pytest.approx(2 * one.flops, rel=0.03)
    assert {name for name, one in ACCELERATORS.items() if one.float8 is None} == {"a100-40gb", "a100-80gb"}


@pytest.mark.parametrize(
    ("precision", "rate"),
    [("32-true", 3e9), ("bf16-mixed", 5e9), ("bf16-true", 5e9), ("16-mixed", 7e9), ("64-true", 1e9)],
)
@pytest.mark.parametrize("processes", [1, 4])
def test_processes_share_the_cores_and_the_memory(
    precision: str, rate: float, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {torch.float32: 3e9, torch.bfloat16: 5e9, torch.float16: 7e9, torch.float64: 1e9}
    monkeypatch.setattr("lightning_danube.device.product_rate", lambda dtype: SimpleNamespace(training=rates[dtype]))
    monkeypatch.setattr("lightning_danube.device.usable_cores", lambda: 8)
    monkeypatch.setattr("lightning_danube.device.usable_memory", lambda: 2**36)
    found = this_cpu(precision, processes)
    assert (found.flops, found.memory) == (8 * rate / processes, 2**36 // processes)
    assert found.name == "this CPU, 8 cores" and found.bandwidth is None and found.share == 0.74
