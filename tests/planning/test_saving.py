"""What a checkpoint and a start cost, by hand."""

import dataclasses

import pytest

from lightning_danube.model import DecoderConfig
from lightning_danube.planning.memory import Layout, TrainingMemory
from lightning_danube.planning.saving import checkpoint_bytes, seconds_of_copy, seconds_to_start

MEMORY = TrainingMemory(DecoderConfig.preset("danube3-500m"), 1, 8192, "bf16-mixed", gpu=True)


@pytest.mark.parametrize(
    ("layout", "parts"),
    [(Layout(), 1), (Layout(4), 1), (Layout(4, sharded=True), 4), (Layout(4, 2, sharded=True), 8), (Layout(1, 2), 2)],
)
def test_a_device_copies_its_part_of_a_checkpoint(layout: Layout, parts: int) -> None:
    """Weights and two averages in four bytes, at the bandwidth that was measured."""
    memory = dataclasses.replace(MEMORY, layout=layout)
    whole = 3 * 4 * MEMORY.config.parameters
    assert checkpoint_bytes(memory) == whole
    assert seconds_of_copy(memory) == pytest.approx(whole / parts / 14.2e9)


def test_compiling_makes_the_first_step_late() -> None:
    """7.3 and 26.9 s for the 500M on an H100 (docs/speed.md)."""
    assert seconds_to_start(MEMORY) == 7.3 and seconds_to_start(dataclasses.replace(MEMORY, compiled=True)) == 26.9
