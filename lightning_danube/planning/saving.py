"""Computes how long a run takes to start, what a checkpoint costs, and how often to save one."""

from __future__ import annotations

import dataclasses
import math

from lightning_danube.planning.memory import Layout, TrainingMemory

HOURS_BETWEEN_FAILURES = 50_000.0
"""Mean time between failures of one device: training Llama 3 on 16,384 devices had 419 unexpected interruptions in 54
days (arXiv 2407.21783, section 3)."""

COPIED = 14.2e9
"""Bytes per second from a device to the memory of its host: PCIe 4.0 with 8 lanes, as Hugging Face measured it on nodes
of 8 H100 ("The Smol Training Playbook")."""

SET_UP = 7.3
"""Seconds until the first step of the 500M on an H100 without compiled blocks (docs/speed.md)."""
COMPILED = 26.9
"""The same with compiled blocks and nothing compiled before."""


@dataclasses.dataclass(frozen=True)
class CheckpointAdvice:
    """How often to save, by Young's first-order approximation (1974): every sqrt(2 × waits × mean time between
    failures).

    Args:
        size: bytes of one checkpoint.
        write: seconds to write one checkpoint.
        between_failures: mean seconds between two failures of the whole job.
        copy: seconds in which training waits for a copy, if it continues while the checkpoint is written; None: it
            waits until the checkpoint is written.
        start: seconds from a resume to the first step.
    """

    size: int
    write: float
    between_failures: float
    copy: float | None = None
    start: float = 0.0

    @property
    def waits(self) -> float:
        """Returns the seconds in which training waits for one checkpoint."""
        return self.write if self.copy is None else self.copy

    @property
    def interval(self) -> float:
        """Returns the seconds between two checkpoints at which the least time is lost. One is written at a time."""
        return max(math.sqrt(2 * self.waits * self.between_failures), self.write)

    def lost(self, interval: float) -> float:
        """Returns the share of the time spent on saving, on starting again, and on steps that a failure lost.

        A failure while a checkpoint is written loses the steps since the one before it.
        """
        unfinished = 0.0 if self.copy is None else self.write
        return self.waits / interval + (interval / 2 + unfinished + self.start) / self.between_failures


def checkpoint_bytes(memory: TrainingMemory) -> int:
    """Returns bytes of the weights that train and of the optimizer's averages, all in the weights' type.

    The rest is a few KB.
    """
    alone = dataclasses.replace(memory, layout=Layout())
    return (alone.trained_parameters + alone.optimizer_values) * memory.weight_bytes


def seconds_of_copy(memory: TrainingMemory) -> float:
    """Returns how long a device takes to copy its part of a checkpoint to its host, all of it without sharding."""
    parts = memory.layout.shares * memory.layout.tensor_parallel
    return checkpoint_bytes(memory) / parts / COPIED


def seconds_to_start(memory: TrainingMemory) -> float:
    """Returns how long a run takes until its first step on a GPU, as far as the model is the cause."""
    return COMPILED if memory.compiled else SET_UP
