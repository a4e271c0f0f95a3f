"""Loaders and samplers that several tasks share: micro-batches of whole optimizer steps, and exact resume.

Batches may be prepared before they are asked for. The position of a run counts optimizer steps, not batches of a
loader, so a resumed run repeats the batches that were prepared and not used.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lightning_danube.signals import SIGNALS
from lightning_danube.terminal import amount
from lightning_danube.training.passes import Pass


def steps_of(one: Pass) -> Iterator[list[list[int]]]:
    """Yields the rows of each step of an epoch."""
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
    """A loader without a state: the data module starts its sampler at the position of the checkpoint.

    Args:
        workers: processes that read rows; 0: this process reads them.
        on_gpu: prepare batches in a thread while the GPU works, in pinned memory. On a CPU, the thread would take cores
            from the products: a batch takes 0.5 % of a step there (docs/speed.md).
    """

    def __init__(self, rows: Dataset[Any], sampler: Sampler[Any], workers: int, *, on_gpu: bool = False) -> None:
        super().__init__(
            rows,
            batch_sampler=sampler,
            collate_fn=_as_is,
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_the_trainer,
        )
        self.on_gpu = on_gpu

    def __iter__(self) -> Any:
        batches = self.batches()
        return Prefetched(map(pinned, batches)) if self.on_gpu else batches

    def batches(self) -> Iterator[Any]:
        """Returns the batches, each of them read when it is asked for."""
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


def trains_on_gpu(trainer: Trainer | None) -> bool:
    """Returns whether the trainer's batches go to an NVIDIA or AMD GPU."""
    return trainer is not None and trainer.strategy.root_device.type == "cuda"


def pinned(batch: Any) -> Any:
    """Returns a batch with its tensors in pinned memory, which a GPU copies while the host continues."""
    if isinstance(batch, Tensor):
        return batch.pin_memory()
    if isinstance(batch, dict):
        return {key: pinned(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_make"):
        return batch._make(map(pinned, batch))
    return batch


class Prefetched(Iterator[Any]):
    """Takes items from an iterator in a thread, before they are asked for. An error of the iterator is raised here.

    Args:
        ahead: number of items that wait at most. The thread holds one more, which it is making.
    """

    def __init__(self, items: Iterator[Any], ahead: int = 2) -> None:
        self._queue: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._ended = False
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        # The thread knows the queue, not this object, which can therefore be deleted.
        arguments = (items, self._queue, self._closed, device)
        self._thread = threading.Thread(target=_fetch, args=arguments, name="batches", daemon=True)
        self._thread.start()

    def __next__(self) -> Any:
        if self._ended:
            raise StopIteration
        item, error = self._queue.get()
        if error is not None:
            self._ended = True
            raise error
        return item

    def close(self) -> None:
        """Ends the thread as soon as it has made its present item."""
        self._ended = True
        self._closed.set()
        while not self._queue.empty():  # the thread may wait for room
            self._queue.get_nowait()

    def __del__(self) -> None:
        self.close()


def _fetch(items: Iterator[Any], into: queue.Queue[Any], closed: threading.Event, device: int | None) -> None:
    try:
        if device is not None:
            torch.cuda.set_device(device)  # a new thread would use the first GPU
        for item in items:
            if closed.is_set():
                return
            into.put((item, None))
        end: BaseException = StopIteration()
    except BaseException as error:
        end = error
    if not closed.is_set():
        into.put((None, end))


def accumulation(key: str, batch: int, micro_batch_size: int, replicas: int) -> int:
    """Returns the micro-batches of one optimizer step on each replica.

    Raises:
        ValueError: the `batch` examples of `data.<key>` do not divide evenly.
    """
    held = replicas * micro_batch_size
    if batch % held:
        near = max(1, round(batch / held)) * held
        raise ValueError(
            f"data.{key} is {batch}, which {amount(replicas, 'device')} × data.micro_batch_size = {micro_batch_size} "
            f"does not divide: {near} would work"
        )
    return batch // held
