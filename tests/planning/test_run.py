"""How many devices a run needs at least, and how large its checkpoints are."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_danube.planning.memory import Layout, TrainingMemory
from lightning_danube.planning.run import fewest_devices, fitting_devices
from lightning_danube.planning.saving import checkpoint_bytes
from tests.tiny_models import CONFIG

SAMPLES = 24
STEP: Any = SimpleNamespace(batch_samples=SAMPLES)


def layouts(memory: TrainingMemory, tensor: int, sharded: bool) -> dict[int, int]:
    """Returns for each number of devices that divides a step the bytes of its peak."""
    found = {}
    for replicas in range(1, SAMPLES + 1):
        micro_batches, rest = divmod(SAMPLES, replicas * memory.rows)
        if micro_batches and not rest:
            layout = Layout(replicas, tensor, sharded)
            here = dataclasses.replace(memory, layout=layout, accumulate=micro_batches > 1)
            found[replicas * tensor] = here.peak().total
    return found


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_the_fewest_devices_are_those_of_trying_all(rows: int, tensor: int, sharded: bool) -> None:
    memory = TrainingMemory(CONFIG, rows, 64, layout=Layout(1, tensor))
    peaks = layouts(memory, tensor, sharded)
    for capacity in sorted({0, *peaks.values(), *(peak - 1 for peak in peaks.values())}):
        expected = next((devices for devices, peak in peaks.items() if peak <= capacity), None)
        assert fewest_devices(memory, STEP, capacity, sharded=sharded) == expected, capacity


@pytest.mark.parametrize("layout", [Layout(), Layout(4), Layout(4, sharded=True), Layout(2, 2, sharded=True)])
def test_a_checkpoint_holds_all_weights_and_moments_whatever_the_layout(layout: Layout) -> None:
    memory = TrainingMemory(CONFIG, 1, 64, layout=layout)
    assert checkpoint_bytes(memory) == 3 * 4 * CONFIG.parameters
    assert checkpoint_bytes(dataclasses.replace(memory, precision="bf16-true")) == 3 * 2 * CONFIG.parameters


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_what_is_said_of_the_fewest_devices_agrees_with_what_fits(rows: int, sharded: bool) -> None:
    """A number of devices fits if and only if the words say so."""
    memory = TrainingMemory(CONFIG, rows, 64)
    peaks = layouts(memory, 1, sharded)
    said = set()
    for capacity in sorted({0, *peaks.values(), *(peak - 1 for peak in peaks.values())}):
        words = fitting_devices(memory, STEP, capacity, sharded=sharded)
        said.add(words.split()[0])
        numbers = [int(one) for one in words.replace("only", "").replace("or", "").replace("none", "").split()]
        for devices, peak in peaks.items():
            if words.startswith("only"):
                told = devices == 1
            elif " or " in words:
                told = devices == 1 or devices >= numbers[1]
            else:
                told = bool(numbers) and devices >= numbers[0]
            assert told == (peak <= capacity), (words, devices, capacity)
    assert said >= {"none", "1"}
    # A replica of DDP holds its gradients and a bucket more than one device alone.
    assert sharded or "only" in said


def test_the_groups_of_a_hybrid_layout_keep_their_size() -> None:
    memory = TrainingMemory(CONFIG, 1, 64, layout=Layout(8, sharded=True, shard_size=4))
    peaks = {}
    for replicas in (1, 2, 3, 4, 8, 12, 24):
        layout = Layout(replicas, sharded=True, shard_size=4 if replicas > 4 else None)
        peaks[replicas] = dataclasses.replace(memory, layout=layout, accumulate=replicas < SAMPLES).peak().total
    for capacity in peaks.values():
        expected = next(replicas for replicas, peak in peaks.items() if peak <= capacity)
        assert fewest_devices(memory, STEP, capacity, sharded=True) == expected
