"""Signals that tell a process to stop: the answer comes at once, the work ends in order. Exit codes, and SLURM's queue.

Python runs a signal handler between two bytecodes, so a matrix product of a minute delays the handler by a minute.
Python's C code writes the number of each signal into a pipe at once, and a thread of this module reads that pipe. The
thread prints the answer, and ends the process on a second Ctrl-C. The main thread unwinds as soon as it can.
A call into C that keeps Python's lock (loading torch's libraries takes a second) delays the thread as well.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from subprocess import CompletedProcess
from types import FrameType
from typing import Any, NoReturn

EXIT_STOPPED = 75
"""Exit code of a run that was told to stop, saved, and waits for `--ckpt_path last`: EX_TEMPFAIL of sysexits.h.

Neither 0 (what was asked is not done) nor 128 + signal (what a process shows that was ended before it could save).
"""

SECONDS_OF_ONE_STOP = 0.2
"""Two SIGINTs within this time are one Ctrl-C: `timeout -s INT` sends its signal to the child and to the group."""

SECONDS_TO_END = 10.0
"""How long a process that has nothing to save may take to end after SIGTERM."""

SECONDS_OF_PATIENCE = 0.5
"""How long a verb that answers Ctrl-C itself is left alone with it."""


class Stopped(SystemExit):
    """Leaves the trainer, or a verb, because a signal said so.

    Args:
        message: for the user.
        code: exit code of this process.
    """

    def __init__(self, message: str, code: int = EXIT_STOPPED) -> None:
        super().__init__(code)
        self.message = message


@dataclass(frozen=True)
class Phase:
    """What a signal means at the moment.

    Args:
        answer: what the user is told, behind the signal's name.
        again: what a second Ctrl-C does.
        raises: the exception that the main thread leaves its work with on SIGINT; None: it looks at `received` itself.
        handles_interrupts: the verb answers Ctrl-C itself and goes on. The thread speaks only if that takes too long.
    """

    answer: str
    again: str = "once more ends at once"
    raises: type[BaseException] | None = Stopped
    handles_interrupts: bool = False


ENDING = Phase("stopping", raises=KeyboardInterrupt)
# Lightning catches KeyboardInterrupt, ignores SIGINT from then on and exits with code 1.
LEAVING_TRAINER = Phase("stopping")
SAVING = Phase(
    "saving after this optimizer step, then stopping", "once more stops at once, without saving", raises=None
)
DONE = Phase("all steps are done and saved, the run ends by itself soon", raises=None)
ANSWERING = Phase("stopping the answer", "once more ends the chat", KeyboardInterrupt, handles_interrupts=True)
PROMPTING = Phase("", raises=KeyboardInterrupt, handles_interrupts=True)


class StopSignals:
    """Answers the signals of this process, and remembers the first.

    There is one object, `SIGNALS`, because a process has one handler for each signal.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._end_first: list[Callable[[], object]] = []
        self._phase = ENDING
        self._answered: object | None = None
        self._first: float | None = None  # when the first signal was seen
        self._answering = threading.Lock()
        self._listening = self._threaded = self._forks_known = False
        self._held: dict[int, Any] = {}
        self._waiting: list[int] | None = None  # signals of the main thread while it starts processes

    @contextmanager
    def ending_first(self, end: Callable[[], object]) -> Iterator[None]:
        """What is called before this process ends at once: it ends a process that this one has started."""
        self._end_first.append(end)
        try:
            yield
        finally:
            self._end_first.remove(end)

    @property
    def answered(self) -> bool:
        """Whether the user has been told that the process stops."""
        return self._answered is not None

    # --- what a signal means ------------------------------------------------------------------------------------------

    @contextmanager
    def listening(self, *, own_process: bool) -> Iterator[None]:
        """Takes SIGINT and SIGTERM while a command line runs. Does nothing outside the main thread.

        Args:
            own_process: the process has no other purpose, so a second Ctrl-C may end it, and a thread may watch.
        """
        if threading.current_thread() is not threading.main_thread() or self._listening:
            yield
            return
        # A signal that whoever started this process has had ignored (nohup, a shell's background job) stays ignored.
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
        self._forget()
        self._phase, self._listening = ENDING, True
        before = self._handle_all(numbers)
        self._leave_to_parent_after_fork()
        close = self._start_thread() if own_process else None
        try:
            yield
        finally:
            self._listening = self._threaded = False
            # While Python shuts down, an exception would be of no use: there the system ends the process.
            _restore(dict.fromkeys(numbers, signal.SIG_DFL) if own_process else before)
            if close is not None:
                close()

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Gives signals another meaning for a while."""
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before
            if phase.handles_interrupts and self.received == signal.SIGINT:
                self._forget()

    def hold(self, numbers: Iterable[int]) -> None:
        """From now on these signals are remembered for whoever looks at `received`, until `release`."""
        if threading.current_thread() is threading.main_thread():
            if not self._listening:
                self._forget()
            self._held = self._handle_all(numbers)
        self._phase = SAVING

    def all_done(self) -> None:
        """What was held for is over; signals are still held, as the process is about to end by itself."""
        self._phase = DONE

    def release(self) -> None:
        """Ends `hold`."""
        if self._phase in (SAVING, DONE):
            self._phase = LEAVING_TRAINER
        _restore(self._held)
        self._held = {}

    def _forget(self) -> None:
        self.received = self._answered = self._first = None

    def _handle_all(self, numbers: Iterable[int]) -> dict[int, Any]:
        return {number: signal.signal(number, self._handle) for number in numbers}

    # --- in the main thread -------------------------------------------------------------------------------------------

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._waiting is not None:
            self._waiting.append(number)
            return
        again = not self._threaded and self._is_second_interrupt(number)
        self._answer(number)
        if again:
            raise KeyboardInterrupt if self._phase.raises is KeyboardInterrupt else Stopped("", 128 + signal.SIGINT)
        if self.received is not None:
            return  # the exception is on its way, or `received` is going to be looked at
        self.received = signal.Signals(number)
        if number == signal.SIGINT and self._phase.raises is KeyboardInterrupt:
            raise KeyboardInterrupt
        if self._phase.raises is not None:
            raise Stopped("", 128 + number)

    # --- in either thread, whichever is first -------------------------------------------------------------------------

    def _answer(self, number: int) -> None:
        """Tells the user, once, what happens now."""
        phase = self._phase
        if number == signal.SIGTERM and phase.handles_interrupts:
            phase = ENDING
        # Not a lock that waits: the handler may have interrupted this very function.
        if phase is PROMPTING or not self._answering.acquire(blocking=False):
            return
        try:
            if self.answered:
                return
            answer = self._answered = object()
        finally:
            self._answering.release()
        if phase.handles_interrupts:

            def say_if_unanswered() -> None:
                if self._answered is answer:
                    _say(number, phase)

            _later(SECONDS_OF_PATIENCE, say_if_unanswered)
            return
        _say(number, phase)
        if number == signal.SIGTERM and phase.raises is not None and self._threaded:
            _later(SECONDS_TO_END, lambda: self._end_now(128 + number))

    def _is_second_interrupt(self, number: int) -> bool:
        now = time.monotonic()
        if self._first is None and self._phase is not PROMPTING:
            self._first = now
        return number == signal.SIGINT and self._first is not None and now - self._first > SECONDS_OF_ONE_STOP

    def _start_thread(self) -> Callable[[], None] | None:
        """Has a thread answer. Returns what ends it; None where another library listens already."""
        reading, writing = os.pipe()
        if os.name != "nt":
            os.set_blocking(writing, False)
        other = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        if other != -1:
            signal.set_wakeup_fd(other)
            os.close(reading)
            os.close(writing)
            return None
        self._threaded = True

        def read() -> None:
            while numbers := os.read(reading, 64):
                for number in numbers:
                    if signal.getsignal(number) == self._handle:
                        if self._is_second_interrupt(number):
                            self._end_now(128 + signal.SIGINT)
                        self._answer(number)
            os.close(reading)

        def close() -> None:
            signal.set_wakeup_fd(-1)
            os.close(writing)

        threading.Thread(target=read, name="signals", daemon=True).start()
        return close

    def _end_now(self, code: int) -> NoReturn:
        """Ends this process and those it has started. Files are whole or not there, so no file breaks."""
        for end in list(self._end_first):
            with suppress(Exception):
                end()
        processes = sys.modules.get("multiprocessing")
        if processes is not None:
            with suppress(Exception):
                # Else the process that watches over semaphores warns that they were left behind.
                sys.modules["multiprocessing.util"]._run_finalizers(0)
            with suppress(Exception):
                for child in processes.active_children():
                    child.kill()
        os._exit(code)

    # --- processes that this one starts -------------------------------------------------------------------------------

    @contextmanager
    def starting_processes(self) -> Iterator[None]:
        """Processes that are started inside never get SIGINT, from their first instruction on.

        A terminal sends Ctrl-C to them as well, and a handler of their own would come too late while they import. Here
        the exception waits until they have been started: half a start ends with a traceback of the new process.
        """
        before = None
        if hasattr(signal, "pthread_sigmask"):  # not on Windows
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        waits = threading.current_thread() is threading.main_thread()
        if waits:
            self._waiting = []
        try:
            yield
        finally:
            if before is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            if waits:
                waiting, self._waiting = self._waiting, None
                for number in waiting or ():
                    self._handle(number, None)

    def _leave_to_parent_after_fork(self) -> None:
        if not self._forks_known and hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget_in_child)
        self._forks_known = True

    def _forget_in_child(self) -> None:
        """A terminal sends Ctrl-C to the children as well. Their parent answers for all of them."""
        if not self._listening:
            return
        self._listening = self._threaded = False
        signal.set_wakeup_fd(-1)  # the pipe is the parent's
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


SIGNALS = StopSignals()


def run_child(command: Sequence[str], *, timeout: float | None = None, **options: Any) -> CompletedProcess[str]:
    """`subprocess.run` with text, for a process that must not outlive this one when a second Ctrl-C ends it at once."""
    with subprocess.Popen(command, text=True, **options) as process, SIGNALS.ending_first(process.kill):
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return CompletedProcess(command, process.returncode, out, err)


def _restore(handlers: dict[int, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _say(number: int, phase: Phase) -> None:
    rank = os.environ.get("LOCAL_RANK", "0")
    if rank != "0" and number == signal.SIGINT:
        return  # a terminal sends it to all ranks, and rank zero answers
    who = f"{signal.Signals(number).name}{'' if rank == '0' else f' on local rank {rank}'}"
    again = f"; {phase.again}" if number == signal.SIGINT else ""
    # The terminal has written ^C where the cursor was.
    line = "\n" if number == signal.SIGINT and os.isatty(2) else ""
    # Not print: the main thread may be in the midst of it.
    with suppress(OSError):
        os.write(2, f"{line}{who}: {phase.answer}{again}\n".encode())


def _later(seconds: float, do: Callable[[], object]) -> None:
    timer = threading.Timer(seconds, do)
    timer.daemon = True
    timer.start()


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
