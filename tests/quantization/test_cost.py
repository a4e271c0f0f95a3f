"""Speeds by a clock that the test sets, and the memory of this process."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_danube.quantization import cost


def test_speeds_are_medians_of_the_rounds_after_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    calls: list[tuple[int, bool]] = []
    seconds = iter([(1000.0, 900.0), (2.0, 0.25), (1.0, 0.5), (4.0, 0.125)])
    of_prompt = of_token = 0.0

    def read(tokens: Sequence[int], anew: bool) -> None:
        nonlocal now, of_prompt, of_token
        if anew:
            of_prompt, of_token = next(seconds)
        calls.append((len(tokens), anew))
        now += of_prompt if anew else of_token

    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: now))
    # A prompt of 256 tokens in 2 s, and a token in 0.25 s.
    assert cost._timed(read, list(range(256 + 16))) == (128.0, 4.0)
    assert calls == [(256, True), *[(1, False)] * 16] * 4


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these files")
def test_memory_is_in_bytes() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    assert cost._status("VmSize") == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), rel=1e-3)
    assert cost._status("VmHWM") >= cost._status("VmRSS") * 0.99


def test_a_peak_is_what_came_on_top(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost.sys, "platform", "linux")
    monkeypatch.setattr(cost, "_status", lambda key: {"VmHWM": 500, "VmRSS": 300}[key])
    assert (cost._peak_since(200), cost._peak_since(600)) == (300, 0)
    assert cost._peak_since(0) is None
