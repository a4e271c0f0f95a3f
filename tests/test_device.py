"""What this machine can do. Rates are faked where a test is about a choice: both kinds of processor on either."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_danube import device
from lightning_danube.device import (
    ProductRate,
    check_memory,
    exact_products_by_onednn,
    fastest_type,
    keep_freed_memory,
    onednn_multiplies,
    onednn_packs,
    onednn_stays_exact,
    product_rate,
    usable_cores,
    usable_memory,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
WITH_16_BITS = {F32: (100e9, 100e9), BF16: (200e9, 200e9), F16: (10e9, 6e9)}
WITHOUT = {F32: (100e9, 100e9), BF16: (10e9, 0.3e9), F16: (11e9, 6e9)}


def fake(monkeypatch: pytest.MonkeyPatch, rates: dict[torch.dtype, tuple[float, float]], inexact: Any = ()) -> None:
    def rate(dtype: torch.dtype, name: str = "cpu") -> ProductRate:
        if dtype not in rates:
            raise ValueError(f"{name} does not multiply {dtype}")
        return ProductRate(*rates[dtype], exact=dtype not in inexact)

    monkeypatch.setattr(device, "product_rate", rate)


@pytest.fixture
def fresh() -> Iterator[None]:
    """Trials of this test are its own."""
    product_rate.cache_clear()
    yield
    product_rate.cache_clear()


@pytest.mark.parametrize(
    ("rates", "forward", "training"),
    [
        (WITH_16_BITS, BF16, BF16),
        (WITHOUT, F32, F32),
        # Fast forward and slow backward: only for what does not train.
        ({F32: (100e9, 100e9), BF16: (150e9, 50e9)}, BF16, F32),
        # A gain that casting the weights would eat.
        ({F32: (100e9, 100e9), BF16: (110e9, 110e9)}, F32, F32),
        ({F32: (100e9, 100e9), BF16: (1e9, 1e9), F16: (300e9, 300e9)}, F16, F16),
        ({F32: (100e9, 100e9)}, F32, F32),
    ],
)
def test_the_fastest_type_is_taken(
    monkeypatch: pytest.MonkeyPatch,
    rates: dict[torch.dtype, tuple[float, float]],
    forward: torch.dtype,
    training: torch.dtype,
) -> None:
    fake(monkeypatch, rates)
    assert fastest_type() == forward
    assert fastest_type(training=True) == training


def test_a_type_that_is_not_exact_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    fake(monkeypatch, {**WITH_16_BITS, F16: (400e9, 400e9)}, inexact={F16})
    assert fastest_type() == BF16
    fake(monkeypatch, WITH_16_BITS, inexact={BF16})
    assert fastest_type() == F32
    # Float32 is always there, also where the user has allowed it to be less exact.
    fake(monkeypatch, WITHOUT, inexact={F32})
    assert fastest_type() == F32


@pytest.mark.usefixtures("fresh")
def test_the_measured_choice_fits_this_processor() -> None:
    rate = product_rate(F32)
    assert rate.exact and rate.forward > 0 and rate.training > 0
    assert product_rate(F32) is rate  # measured once
    assert product_rate(BF16).exact
    if not onednn_multiplies(BF16):
        # Without instructions for them PyTorch's own loops remain, which are far behind any library.
        assert product_rate(BF16).training < rate.training and fastest_type(training=True) == F32


@pytest.mark.usefixtures("fresh")
def test_a_trial_changes_nothing() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    with torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert product_rate(F32).exact
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert torch.get_num_threads() == threads and torch.get_float32_matmul_precision() == "highest"


@pytest.mark.usefixtures("fresh")
def test_a_type_that_cannot_be_multiplied_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*matrices: torch.Tensor) -> None:
        raise RuntimeError("not implemented for 'Half'\nand a trace")

    monkeypatch.setattr("torch.mm", refuse)
    with pytest.raises(ValueError, match=r"^cpu does not multiply float16: not implemented for 'Half'$"):
        product_rate(F16)


def test_compiled_code_can_ask() -> None:
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if onednn_multiplies(x.dtype) and device.onednn_multiplies_float32() else x * 2 + 0

    compiled = torch.compile(doubled, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(torch.ones(2)), torch.full((2,), 2.0), rtol=0, atol=0)


def test_without_onednn_nothing_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: False)
    assert not any(onednn_packs(dtype) or onednn_multiplies(dtype) for dtype in (F32, BF16, F16))
    with exact_products_by_onednn():
        assert not device.onednn_multiplies_float32()


def test_products_are_given_to_onednn_and_taken_back() -> None:
    assert torch.get_float32_matmul_precision() == "highest"
    with exact_products_by_onednn() as allowed:
        assert torch.get_float32_matmul_precision() == ("medium" if allowed else "highest")
        a, b = torch.randn(64, 384), torch.randn(384, 64)
        # 384 terms of order one: float32's roundings, whichever library it is.
        torch.testing.assert_close((a @ b).double(), a.double() @ b.double(), rtol=0, atol=1e-4)
    assert torch.get_float32_matmul_precision() == "highest"


def test_not_where_it_would_round_to_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.mm(a, b) if a.dtype == torch.float64 else torch.mm(a.bfloat16(), b.bfloat16()).float()

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not onednn_stays_exact()
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_users_own_choice_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "onednn_stays_exact", lambda: True)
    torch.set_float32_matmul_precision("high")
    try:
        with exact_products_by_onednn() as allowed:
            assert not allowed and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_cores_are_counted_on_every_system(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= usable_cores() <= (os.cpu_count() or 1)
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    assert usable_cores() == os.cpu_count()
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert usable_cores() == 1


def test_the_allocator_is_told_where_there_is_one() -> None:
    assert keep_freed_memory() is (platform.libc_ver()[0] == "glibc")


HEAP = """
import torch
from lightning_danube.device import keep_freed_memory
keep_freed_memory()
block = torch.ones(2**24)
resident = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS"))
before = resident()
del block
print(before - resident())
"""


@pytest.mark.medium
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_large_blocks_are_kept_when_they_are_freed() -> None:
    given_back = subprocess.run([sys.executable, "-c", HEAP], capture_output=True, text=True, check=True).stdout
    assert int(given_back) < 2**14  # KiB, of the block's 2**16


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize("name", ["_is_mkldnn_bf16_supported", "_is_mkldnn_fp16_supported"])
def test_pytorch_still_has_the_private_question_for_16_bit_products(name: str) -> None:
    assert isinstance(getattr(torch.ops.mkldnn, name)(), bool)


def test_pytorchs_compiler_still_reads_the_private_mark_of_a_constant() -> None:
    def theirs() -> bool:
        return True

    def ours() -> bool:
        return True

    torch.compiler.assume_constant_result(theirs)
    device.constant_in_compiled_code(ours)
    assert vars(ours) == vars(theirs)


# --- rates by hand ----------------------------------------------------------------------------------------------------


def test_rates_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sizes: products of 64 take 1, 2 and 3 units of time, products of 128 take 4 times as long."""
    unit = 1e-6
    sizes: list[int] = []

    def seconds(product: Any, name: str) -> float:
        x, _ = product.args
        sizes.append(len(x))
        turn = (len(sizes) - 1) % 3
        return (turn + 1) * unit * (len(x) / 64) ** 2

    monkeypatch.setattr(device, "_best_time", seconds)
    monkeypatch.setattr(device, "SIZES", {"cpu": (64, 128)})
    forward, training = device._rates(F32, "cpu")
    assert sizes == [64] * 3 + [128] * 3
    flops = 2 * 128**3
    assert forward == pytest.approx(flops / (4 * unit)) and training == pytest.approx(3 * flops / (24 * unit))
    # A size that takes long is the last.
    monkeypatch.setattr(device, "SECONDS_OF_A_SIZE", unit)
    sizes.clear()
    device._rates(F32, "cpu")
    assert sizes == [64] * 3


def test_the_fastest_try_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times, calls = iter((5.0, 3.0, 4.0)), []
    monkeypatch.setattr(device, "_time", lambda product, name: next(times))
    assert device._best_time(lambda: calls.append(1) or torch.ones(1), "cpu") == 3.0  # type: ignore[func-returns-value]
    assert calls == [1], "the first call compiles"


def test_cores_that_are_taken_away_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {3, 5, 7}, raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert usable_cores() == 3


def test_sums_are_as_wide_as_the_device_allows() -> None:
    widths = [device.widest_float(torch.device(name)) for name in ("cpu", "cuda", "mps")]
    assert widths == [torch.float64, torch.float64, torch.float32]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_the_least_of_all_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    machine = Path("/proc/meminfo").read_text()
    kilobytes = dict(re.findall(r"^(\w+): +(\d+) kB", machine, re.MULTILINE))
    total = int(kilobytes["MemTotal"]) + int(kilobytes["SwapTotal"])
    monkeypatch.setattr(device, "_limits_of_groups", lambda *_: [])
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert usable_memory() == 1024 * total
    monkeypatch.setattr(device, "_limits_of_groups", lambda *_: [3_000_000, 2_000_000])
    assert usable_memory() == 2_000_000
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1_000_000 if which == resource.RLIMIT_AS else 1, 1))
    assert usable_memory() == 1_000_000
    check_memory("model.decoder", 1_000_000)
    with pytest.raises(ValueError, match=r"^model.decoder has 2.5 GB of weights, more than the 0.0 GB of memory that"):
        check_memory("model.decoder", 2_500_000_000)


def test_limits_of_control_groups_and_of_those_above_them(tmp_path: Path) -> None:
    groups, mounted = tmp_path / "cgroup", tmp_path / "fs"
    (mounted / "user" / "job").mkdir(parents=True)
    (mounted / "user" / "job" / "memory.max").write_text("max\n")
    (mounted / "user" / "memory.max").write_text("5000\n")
    (mounted / "memory" / "job").mkdir(parents=True)
    (mounted / "memory" / "job" / "memory.limit_in_bytes").write_text("7000\n")
    (tmp_path / "memory.max").write_text("1\n")  # above the root
    groups.write_text("9:cpu,cpuacct:/user\n8:memory:/job\n0::/user/job\n")
    assert sorted(device._limits_of_groups(groups, mounted)) == [5000, 7000]
    groups.write_text("damaged\n")
    assert device._limits_of_groups(groups, mounted) == []
    assert device._limits_of_groups(tmp_path / "nothing", mounted) == []


def test_threads_and_types_of_the_program_stay_its_own() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with device._undisturbed("cpu"):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    with torch.autocast("cpu", BF16):
        types = [device.type_under_autocast(one, "cpu") for one in (torch.float64, F32)]
    assert types == [torch.float64, BF16] and device.type_under_autocast(F32, "cpu") == F32


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_swap_is_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(Path, "read_text", lambda self: "MemTotal: 30 kB\nMemFree: 1 kB\nSwapTotal: 12 kB\n")
    monkeypatch.setattr(device, "_limits_of_groups", lambda *_: [])
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert usable_memory() == 42 * 1024
