"""The benchmark of attention: its kernels compute the same, and a row of its table."""

from argparse import Namespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F


@pytest.fixture
def benchmark(benchmarks_on_path: None) -> Any:
    import attention_kernels

    return attention_kernels


def test_all_kernels_compute_causal_attention(benchmark: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 70, 16, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    k4, v4 = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    expected = F.scaled_dot_product_attention(q, k4, v4, is_causal=True)
    found = {name: kernel(q, k, v) for name, kernel in benchmark.kernels("cpu", 2).items()}
    assert len(found) == 3
    for name, mixed in found.items():
        torch.testing.assert_close(mixed, expected, rtol=1e-10, atol=1e-12, msg=name)


def test_all_kernels_of_a_decoding_step_compute_the_same(benchmark: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, heads, tokens, 16, generator=generator, dtype=torch.float64)
        for heads, tokens in ((4, 1), (2, 70), (2, 70))
    )
    expected = F.scaled_dot_product_attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
    # As it is written; compiling it is the benchmark's business.
    kernels = {**benchmark.decoding_kernels("cpu", 2, 70), "sums of products, compiled": benchmark.sums}
    assert len(kernels) == 4
    for name, kernel in kernels.items():
        torch.testing.assert_close(kernel(q, k, v).reshape(expected.shape), expected, rtol=1e-6, atol=1e-6, msg=name)


def test_a_row_is_the_median_of_its_rounds(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*tensors: Any) -> None:
        raise RuntimeError("no kernel for 120 channels\nand more")

    times = iter([9.0, 2.0, 4.0, 3.0])
    monkeypatch.setattr(benchmark, "kernels", lambda device, groups: {"one": lambda q, k, v: q, "two": refuse})
    monkeypatch.setattr(benchmark, "time_of", lambda kernel, q, k, v: kernel(q, k, v) is not None and next(times))
    rows = benchmark.compared(2, 1, 8, 4, Namespace(rows=3, device="cpu", dtype="fp32", rounds=3, decode=False))
    # 7 x 2 x 3 rows x 2 heads x 4 x 4 / 2 x 8 channels = 5,376 FLOPs in 3 s.
    assert rows[0] == ["one", "3000.00", "2000.00 to 4000.00", "1.79e-09"]
    assert rows[1] == ["two", "not for this shape: no kernel for 120 channels", "", ""]
