"""Limits the time and memory of a chat template. A template is an untrusted program, in a language with loops."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

MOST_SECONDS = 10.0
"""Processor time of one conversation. Usual templates take some thousandths of a second."""
MOST_MEMORY = 1 << 30
"""Bytes that a template may take beyond what the process has."""


class TooLong(BaseException):
    """The template computes for too long. Not an `Exception`, because Jinja ignores those of constant expressions."""


@contextmanager
def limited(seconds: float = MOST_SECONDS, memory: int = MOST_MEMORY) -> Iterator[None]:
    """Ends a block that computes for too long or takes too much memory.

    Time is limited in the main thread only, and memory on Linux only: both are where templates are rendered.

    Raises:
        TooLong: the block computes for more than `seconds`.
        MemoryError: the block takes more than `memory`.
    """
    with _limited_memory(memory), _limited_time(seconds):
        yield


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise TooLong

    # Processor time: a process that waits or is suspended is not at fault. A signal also ends the product of huge
    # numbers, which a thread could not.
    before = signal.signal(signal.SIGVTALRM, end)
    try:
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextmanager
def _limited_memory(memory: int) -> Iterator[None]:
    try:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError, ValueError):
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * os.sysconf("SC_PAGE_SIZE") + memory
    if soft != resource.RLIM_INFINITY and soft <= most:
        yield
        return
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
