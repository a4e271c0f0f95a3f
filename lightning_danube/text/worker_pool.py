"""Processes that share the work of a verb. They end with the process that started them, and never receive SIGINT."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

from lightning_danube.signals import SIGNALS


class WorkerPool(ProcessPoolExecutor):
    """Starts its processes by "spawn", because threads of torch or of a tokenizer do not survive a fork.

    Args:
        processes: number of processes.
        initializer: called first in each process.
    """

    def __init__(self, processes: int, initializer: Callable[[], object] | None = None) -> None:
        # Python starts a process that counts semaphores. SLURM's signal would end it, too.
        with SIGNALS.starting_processes(), _silent_tracker():
            super().__init__(processes, multiprocessing.get_context("spawn"), _begin, (initializer,))

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        # Processes start here. A terminal sends Ctrl-C to them as well, and each would print a traceback.
        with SIGNALS.starting_processes():
            return super().submit(function, *args, **kwargs)

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        # After an exception nobody reads the results, so do not wait for them.
        self.shutdown(cancel_futures=kind is not None)


@contextmanager
def _silent_tracker() -> Iterator[None]:
    """Starts multiprocessing's resource tracker, a separate process, without its warning about leaked semaphores.

    After `kill -9` the tracker removes the semaphores of this process, as it should, and then warns the user of them.
    """
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [before, "ignore:resource_tracker:UserWarning"]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _begin(initializer: Callable[[], object] | None) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end_with_parent() -> None:
        parent.join()  # also after kill -9
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer()
