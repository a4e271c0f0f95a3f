"""The file of a measurement."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from lightning_danube.quantization.measured import Content, Cost, MeasuredLevel, load_measured, save_measured

GENERATOR = np.random.default_rng(0)
MEASURED = MeasuredLevel(
    Content(2**40 + 1, 7, {"Q8_0": 3}),
    12.5,
    {64: GENERATOR.gamma(2.0, 1.5, (4, 5)).astype(np.float32), 32: GENERATOR.random((8, 3)).astype(np.float32)},
    GENERATOR.random((4, 5)).astype(np.float32) * 1e-7,
    GENERATOR.random((4, 5)) < 0.5,
    GENERATOR.random(9) < 0.5,
)


@pytest.mark.parametrize("cost", [None, Cost(3.5, 1.25, None), Cost(3.5, 1.25, 2**33)])
def test_what_is_read_is_what_was_written(tmp_path: Path, cost: Cost | None) -> None:
    wanted = replace(MEASURED, cost=cost, cost_reason="" if cost else "no room")
    save_measured(tmp_path / "a.npz", wanted)
    found = load_measured(tmp_path / "a.npz")
    assert found is not None
    assert (found.content, found.seconds) == (wanted.content, wanted.seconds)
    assert (found.cost, found.cost_reason) == (wanted.cost, wanted.cost_reason)
    assert found.nats.keys() == wanted.nats.keys()
    arrays = [(found.nats[length], wanted.nats[length]) for length in wanted.nats]
    arrays += [(getattr(found, name), getattr(wanted, name)) for name in ("divergence", "same_first", "cloze")]
    for left, right in arrays:
        assert left.dtype == right.dtype and np.array_equal(left, right)


def test_a_file_that_is_missing_or_damaged_is_no_measurement(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    assert load_measured(path) is None
    save_measured(path, MEASURED)
    path.write_bytes(path.read_bytes()[:-40])
    assert load_measured(path) is None
