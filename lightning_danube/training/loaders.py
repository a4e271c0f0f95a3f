"""Loaders and samplers that several tasks share: micro-batches of whole optimizer steps, and exact resume."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_danube.signals import SIGNALS
from lightning_danube.training.passes import Pass


def steps_of(one: Pass) -> Iterator[list[list[int]]]:
    """Yields the rows of each step of a pass."""
    for first, behind in pairwise(range(0, len(one.rows) + 1, one.batch_rows)):
        yield one.rows[first:behind]


class StepRows(list[list[int]]):
    """Rows of a micro-batch, and the number of labels in its whole optimizer step.

    The loss is a mean over the whole step, even if its labels are spread unevenly over micro-batches and devices.
    """

    step_labels: int = 0


class StepSampler(Sampler[StepRows]):
    """Yields this replica's micro-batches from step `start` on. Replicas take the micro-batches of a step in turn."""

    def __init__(
        self,
        passes: Sequence[Pass],
        labels: NDArray[np.int64],
        *,
        micro_batch_size: int,
        replicas: int,
        replica: int,
        start: int = 0,
    ) -> None:
        self.passes, self.labels, self.start = passes, labels, start
        self.micro_batch_size, self.replicas, self.replica = micro_batch_size, replicas, replica

    def __len__(self) -> int:
        """Returns the micro-batches of the whole run, for any `start`: the trainer counts the earlier ones as done."""
        return sum(len(one.rows) for one in self.passes) // (self.micro_batch_size * self.replicas)

    def __iter__(self) -> Iterator[StepRows]:
        steps = (step for one in self.passes for step in steps_of(one))
        for number, rows in enumerate(steps):
            if number < self.start:
                continue
            step_labels = int(self.labels[[chat for row in rows for chat in row]].sum())
            stride = self.micro_batch_size * self.replicas
            for first in range(self.replica * self.micro_batch_size, len(rows), stride):
                mine = StepRows(rows[first : first + self.micro_batch_size])
                mine.step_labels = step_labels
                yield mine


class ResumableLoader(DataLoader[Any]):
    """A loader without a state: the data module starts its sampler at the position of the checkpoint."""

    def __init__(self, rows: Dataset[Any], sampler: Sampler[Any], workers: int, *, pin_memory: bool = False) -> None:
        super().__init__(
            rows,
            batch_sampler=sampler,
            collate_fn=_as_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_the_trainer,
            pin_memory=pin_memory,
        )

    def __iter__(self) -> Any:
        # Worker processes start here; a Ctrl-C during their imports would end them with a traceback.
        with SIGNALS.starting_processes():
            return super().__iter__()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        pass


def _leave_signals_to_the_trainer(worker: int) -> None:
    """Moves a loader process into its own process group, and ignores SIGUSR1 in it.

    A signal to the whole group (`timeout`, a shell, a terminal) must not end the loaders of a run that will save.
    """
    if sys.platform != "win32":  # Windows has neither
        os.setpgid(0, 0)
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def _as_is(batch: Any) -> Any:
    return batch


def accumulation(key: str, batch: int, micro_batch_size: int, replicas: int) -> int:
    """Returns the micro-batches of one optimizer step on each replica.

    Raises:
        ValueError: the `batch` examples of `data.<key>` do not divide evenly.
    """
    held = replicas * micro_batch_size
    if batch % held:
        near = max(1, round(batch / held)) * held
        raise ValueError(
            f"data.{key} is {batch}, which {replicas} device(s) × data.micro_batch_size {micro_batch_size} do not "
            f"divide: {near} would work"
        )
    return batch // held
