"""Being told to stop: which signals mean it, how a run ends then, and how SLURM starts it again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from types import FrameType

EXIT_STOPPED = 75
"""Exit code of a run that was told to stop, saved, and waits for `--ckpt_path last`: EX_TEMPFAIL of sysexits.h.

Neither 0 (what was asked is not done) nor 128 + signal (what a process shows that was ended before it could save).
"""


class Stopped(SystemExit):
    """Leaves the trainer after the checkpoint is on disk.

    Args:
        message: for the user.
        code: exit code of this process.
    """

    def __init__(self, message: str, code: int = EXIT_STOPPED) -> None:
        super().__init__(code)
        self.message = message


class StopSignals:
    """Remembers the first of some signals. A second SIGINT interrupts at once, as Ctrl-C does elsewhere."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def listen(self, signals: Iterable[int]) -> None:
        """Takes the signals from whoever handled them. Lightning gives all of them back when its trainer ends."""
        if threading.current_thread() is threading.main_thread():
            for number in signals:
                signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number)
            again = "; once more stops at once, without saving" if number == signal.SIGINT else ""
            # Not print: the signal may have come while that was writing.
            os.write(2, f"{self.received.name}: saving after this optimizer step, then stopping{again}\n".encode())


def requeue_slurm_job() -> str:
    """Has SLURM put the job this process belongs to back into its queue; returns what to tell the user."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
    if not re.fullmatch(r"[0-9]+(_[0-9]+)?", job):
        return f"no SLURM job to requeue: SLURM_JOB_ID is {job!r}"
    try:
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    except OSError as error:
        return f"SLURM job {job} was not requeued: scontrol: {error.strerror}"
    if result.returncode:
        return f"SLURM job {job} was not requeued: {' '.join(result.stderr.split()) or f'exit {result.returncode}'}"
    return f"SLURM job {job} requeued"


def tell(text: str) -> None:
    """A line for whoever watches, beside what the run prints."""
    print(text, file=sys.stderr, flush=True)
