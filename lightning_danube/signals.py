"""Handles stop signals: tells the user at once, then ends the work in order. Exit codes, and requeuing a SLURM job.

Python runs a signal handler between two bytecodes, so a matrix product of a minute delays the handler by a minute.
Python's C code writes the number of each signal into a pipe at once, and a thread of this module reads that pipe. The
thread prints the answer, and ends the process on a second Ctrl-C. The main thread unwinds as soon as it can.
A call into C that holds Python's global lock (loading torch's libraries takes a second) delays the thread as well.
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
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from subprocess import CompletedProcess
from types import FrameType
from typing import Any, NoReturn

EXIT_STOPPED = 75
"""Exit code of a run that was told to stop and has saved; `--ckpt_path last` resumes it. EX_TEMPFAIL of sysexits.h.

It is not 0, because the run is not finished, and not 128 + signal, the code of a process that could not save.
"""

USR1: signal.Signals | None = getattr(signal, "SIGUSR1", None)
"""The signal by which SLURM says that a job's time is nearly over. Windows has none."""

SECONDS_OF_ONE_STOP = 0.2
"""Two SIGINTs within this time count as one Ctrl-C: `timeout -s INT` signals both the child and its group."""

SECONDS_TO_END = 10.0
"""How long a process that has nothing to save may take to end after SIGTERM."""

PARENT = "LIGHTNING_DANUBE_PARENT"
"""Environment variable of a process that `run_child` has started: the process id of its parent."""

SECONDS_OF_PATIENCE = 0.5
"""How long the thread waits before it answers a Ctrl-C that the verb handles itself."""


class Stopped(SystemExit):
    """Leaves the trainer or a verb after a stop signal.

    Args:
        message: for the user.
        code: exit code of this process.
    """

    def __init__(self, message: str, code: int = EXIT_STOPPED) -> None:
        super().__init__(code)
        self.message = message


@dataclass(frozen=True)
class Phase:
    """How the process reacts to a signal at the moment.

    Args:
        answer: message to the user, printed after the signal's name.
        again: message that says what a second Ctrl-C does.
        raises: the exception that SIGINT raises in the main thread; None: the main thread checks `received` itself.
        handles_interrupts: the verb handles Ctrl-C itself and continues. The thread answers only if that takes too
            long.
        seconds: how long the process may take to end after SIGTERM or SIGUSR1; None: as long as it needs.
    """

    answer: str
    again: str = "once more ends at once"
    raises: type[BaseException] | None = Stopped
    handles_interrupts: bool = False
    seconds: float | None = SECONDS_TO_END


ENDING = Phase("stopping", raises=KeyboardInterrupt)
# Lightning catches KeyboardInterrupt, ignores SIGINT from then on and exits with code 1.
LEAVING_TRAINER = Phase("stopping")
SAVING = Phase(
    "saving after this optimizer step, then stopping", "once more stops at once, without saving", raises=None
)
CHILD_SAVES = Phase(
    "the run saves and ends first", "once more ends it at once, unsaved", KeyboardInterrupt, seconds=None
)
DONE = Phase("all steps are done and saved, the run ends soon", raises=None)
ANSWERING = Phase("stopping the answer", "once more ends the chat", KeyboardInterrupt, handles_interrupts=True)
PROMPTING = Phase("", raises=KeyboardInterrupt, handles_interrupts=True)


class StopSignals:
    """Answers the signals of this process, and remembers the first signal.

    There is one object, `SIGNALS`, because a process has one handler for each signal.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._end_first: list[Callable[[], object]] = []
        self._phase = ENDING
        self._answered: object | None = None
        self._answered_interrupt = False
        self._first: float | None = None  # when the first signal was seen that a Ctrl-C follows as the second one
        self._at_prompt = 0.0  # when the main thread took the last Ctrl-C at a prompt
        self._answering = threading.Lock()
        self._listening = self._threaded = self._forks_known = False
        self._held: dict[int, Any] = {}
        self._waiting: list[int] | None = None  # signals of the main thread while it starts processes

    @contextmanager
    def ending_first(self, end: Callable[[], object]) -> Iterator[None]:
        """Registers a function that runs before this process ends at once; it ends a process that this one started."""
        self._end_first.append(end)
        try:
            yield
        finally:
            self._end_first.remove(end)

    @property
    def answered(self) -> bool:
        """Whether the user has been told that the process stops."""
        return self._answered is not None

    # --- the meaning of a signal --------------------------------------------------------------------------------------

    @contextmanager
    def listening(self, *, own_process: bool) -> Iterator[None]:
        """Takes SIGINT, SIGTERM and SIGUSR1 while a command line runs. Does nothing outside the main thread.

        Args:
            own_process: the process runs only this command line, so a second Ctrl-C may end it, and a thread may watch.
        """
        if threading.current_thread() is not threading.main_thread() or self._listening:
            yield
            return
        # A signal that the parent process ignores (nohup, a shell's background job) stays ignored.
        taken = [n for n in (signal.SIGINT, signal.SIGTERM, USR1) if n is not None]
        numbers = [n for n in taken if signal.getsignal(n) != signal.SIG_IGN]
        self._forget()
        self._phase, self._listening = ENDING, True
        before = self._handle_all(numbers)
        self._leave_to_parent_after_fork()
        close = self._start_thread() if own_process else None
        if own_process:
            _stop_with_parent()
        try:
            yield
        finally:
            self._listening = self._threaded = False
            # While Python shuts down, nothing can catch an exception: let the system end the process. Rank zero would
            # take such an end of another rank for a failure, and end itself, perhaps within a save. SIGUSR1 does not
            # ask a process to end, and the exit code is decided.
            ending = signal.SIG_DFL if _local_rank() == "0" else signal.SIG_IGN
            at_end: dict[int, Any] = {n: signal.SIG_IGN if n == USR1 else ending for n in numbers}
            _restore(at_end if own_process else before)
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
        """Stores these signals in `received` from now on, without an exception, until `release`."""
        if threading.current_thread() is threading.main_thread():
            if not self._listening:
                self._forget()
            self._held = self._handle_all(numbers)
        self._phase = SAVING

    def stop_with_others(self) -> None:
        """Says that this process leaves because another rank got a signal. A signal of its own changes nothing now."""
        if self.received is None:
            self.received = signal.SIGTERM

    def all_done(self) -> None:
        """Says that all work is saved. Signals are still held, because the process will soon end by itself."""
        self._phase = DONE

    def release(self) -> None:
        """Ends `hold`. A run that is done stays done: what is left of it takes no signal."""
        if self._phase is SAVING:
            self._phase = LEAVING_TRAINER
        _restore(self._held)
        self._held = {}

    def _forget(self) -> None:
        self.received = self._answered = self._first = None
        self._answered_interrupt = False

    def _handle_all(self, numbers: Iterable[int]) -> dict[int, Any]:
        return {number: signal.signal(number, self._handle) for number in numbers}

    # --- in the main thread -------------------------------------------------------------------------------------------

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._waiting is not None:
            self._waiting.append(number)
            return
        if number == signal.SIGINT and self._phase is PROMPTING:
            # This stops nothing, so it is not remembered: the next one is the first again.
            self._at_prompt = time.monotonic()
            raise KeyboardInterrupt
        again = not self._threaded and self._is_second_interrupt(number)
        self._answer(number)
        if again:
            raise KeyboardInterrupt if self._phase.raises is KeyboardInterrupt else Stopped("", 128 + signal.SIGINT)
        if self.received is not None:
            return  # the exception was already raised, or the main thread will check `received`
        self.received = signal.Signals(number)
        if number == signal.SIGINT and self._phase.raises is KeyboardInterrupt:
            raise KeyboardInterrupt
        if self._phase.raises is not None:
            raise Stopped("", 128 + number)

    # --- in either thread, whichever is first -------------------------------------------------------------------------

    def _answer(self, number: int) -> None:
        """Tells the user once what the process does now."""
        phase = self._phase
        if number != signal.SIGINT and phase.handles_interrupts:
            phase = ENDING
        # Do not wait for the lock: the handler may have interrupted this function while it held the lock.
        if phase is PROMPTING or not self._answering.acquire(blocking=False):
            return
        try:
            # A Ctrl-C after SIGTERM gets its own answer if it is the first of two.
            if self.answered and (number != signal.SIGINT or self._answered_interrupt or phase.raises is not None):
                return
            self._answered_interrupt = number == signal.SIGINT
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
        if number != signal.SIGINT and phase.raises is not None and phase.seconds is not None and self._threaded:
            _later(phase.seconds, lambda: self._end_now(requeued(128 + number)))

    def _is_second_interrupt(self, number: int) -> bool:
        now = time.monotonic()
        # While the run is saved, SIGTERM is not a first Ctrl-C: the user does not know yet what a second Ctrl-C does.
        counts = number == signal.SIGINT or self._phase.raises is not None
        if self._first is None and self._phase is not PROMPTING and counts:
            self._first = now
        return number == signal.SIGINT and self._first is not None and now - self._first > SECONDS_OF_ONE_STOP

    def _start_thread(self) -> Callable[[], None] | None:
        """Starts the thread that answers. Returns a function that ends it; None if another library already listens."""
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
                        if number == signal.SIGINT and self._phase is PROMPTING:
                            self._interrupt_prompt_again()
                        self._answer(number)
            os.close(reading)

        def close() -> None:
            signal.set_wakeup_fd(-1)
            os.close(writing)

        threading.Thread(target=read, name="signals", daemon=True).start()
        return close

    def _interrupt_prompt_again(self) -> None:
        """Repeats a Ctrl-C at a prompt if the main thread has not taken it.

        Python's input() shows the prompt and then waits for a key. It does not see a signal that arrives in between.
        """
        came = time.monotonic()

        def repeat_if_not_taken() -> None:
            if self._phase is PROMPTING and self._at_prompt < came - SECONDS_OF_ONE_STOP:
                main = threading.main_thread().ident
                assert main is not None, "the main thread runs"
                signal.pthread_kill(main, signal.SIGINT)

        if hasattr(signal, "pthread_kill"):  # not on Windows
            _later(SECONDS_OF_PATIENCE, repeat_if_not_taken)

    def _end_now(self, code: int) -> NoReturn:
        """Ends this process and the processes that it started. This damages no file, because files appear complete."""
        for end in list(self._end_first):
            with suppress(Exception):
                end()
        processes = sys.modules.get("multiprocessing")
        if processes is not None:
            with suppress(Exception):
                # Otherwise multiprocessing's resource tracker warns about leaked semaphores.
                sys.modules["multiprocessing.util"]._run_finalizers(0)
            with suppress(Exception):
                for child in processes.active_children():
                    child.kill()
        os._exit(code)

    # --- processes that this one starts -------------------------------------------------------------------------------

    @contextmanager
    def starting_processes(self) -> Iterator[None]:
        """Blocks SIGINT and SIGUSR1 from the first instruction on in processes that are started inside this context.

        A terminal and SLURM also send these to them, and while they import, their own handler is not yet installed. In
        this process the exception waits until they are started: an interrupted start prints the new process's
        traceback.
        """
        before = None
        if hasattr(signal, "pthread_sigmask"):  # not on Windows
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGUSR1})
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
        """Ignores Ctrl-C and SIGUSR1 in a forked child: a terminal and SLURM also send them to children, and the parent
        answers for them."""
        if not self._listening:
            return
        self._listening = self._threaded = False
        signal.set_wakeup_fd(-1)  # the pipe is the parent's
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if USR1 is not None:
            signal.signal(USR1, signal.SIG_IGN)


SIGNALS = StopSignals()


def run_child(
    command: Sequence[str], *, timeout: float | None = None, saves: bool = False, **options: Any
) -> CompletedProcess[str]:
    """Runs a command like `subprocess.run` with text, and kills it if a second Ctrl-C ends this process at once.

    Args:
        saves: the command is one of this project's, which saves its work when it is told to stop. A signal to this
            process is passed on, and the command may take the time that it needs. If this process is killed, the
            command saves and ends as well.
    """
    if saves:
        options["env"] = {**(options.get("env") or os.environ), PARENT: str(os.getpid())}
    with subprocess.Popen(command, text=True, **options) as process, SIGNALS.ending_first(process.kill):
        try:
            with SIGNALS.during(CHILD_SAVES) if saves else nullcontext():
                out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            if saves and isinstance(error, KeyboardInterrupt | Stopped):
                process.terminate()
                with suppress(KeyboardInterrupt, Stopped):  # a second Ctrl-C
                    process.wait()
            process.kill()
            raise
    return CompletedProcess(command, process.returncode, out, err)


def _stop_with_parent() -> None:
    """Stops this process as SIGTERM does when the process that started it by `run_child` is gone."""
    parent = os.environ.pop(PARENT, None)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(SECONDS_OF_ONE_STOP)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def _restore(handlers: dict[int, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _local_rank() -> str:
    return os.environ.get("LOCAL_RANK", "0")


def _say(number: int, phase: Phase) -> None:
    rank = _local_rank()
    if (rank != "0" and number == signal.SIGINT) or os.environ.get("SLURM_PROCID", "0") != "0":
        return  # a terminal sends SIGINT to all ranks, SLURM sends every signal to all tasks, and the first one answers
    who = f"{signal.Signals(number).name}{'' if rank == '0' else f' on local rank {rank}'}"
    again = f"; {phase.again}" if number == signal.SIGINT else ""
    # The terminal has written ^C at the cursor.
    line = "\n" if number == signal.SIGINT and os.isatty(2) else ""
    # Not print: this may interrupt a print of the main thread.
    with suppress(OSError):
        os.write(2, f"{line}{who}: {phase.answer}{again}\n".encode())


def _later(seconds: float, do: Callable[[], object]) -> None:
    timer = threading.Timer(seconds, do)
    timer.daemon = True
    timer.start()


def requeued(code: int) -> int:
    """Returns the exit code of a process that a signal ends before there is anything to save.

    SIGUSR1 inside a SLURM job says that the job's time is nearly over. Then the first task puts the job back into the
    queue, where it begins again.

    Args:
        code: 128 + the number of the signal.
    """
    if USR1 is None or code != 128 + USR1 or "SLURM_JOB_ID" not in os.environ:
        return code
    if os.environ.get("SLURM_PROCID", "0") == "0":
        with suppress(OSError):
            os.write(2, f"{requeue_slurm_job()}\n".encode())  # not print: see `_say`
    return EXIT_STOPPED


def slurm_job() -> str | None:
    """Returns the number of the SLURM job that this process belongs to, as scontrol takes it; None outside a job."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ.get("SLURM_JOB_ID", "")
    return job if re.fullmatch(r"[0-9]+(_[0-9]+)?", job) else None


def ask_slurm(*command: str) -> str:
    """Runs a command of SLURM, and returns what it prints.

    Raises:
        ValueError: it failed, and why.
    """
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise ValueError(f"{command[0]}: {error.strerror}") from error
    if result.returncode:
        raise ValueError(" ".join(result.stderr.split()) or f"exit {result.returncode}")
    return result.stdout


def requeue_slurm_job() -> str:
    """Asks SLURM to put this process's job back into the queue. Returns a message for the user."""
    job = slurm_job()
    if job is None:
        return f"no SLURM job to requeue: SLURM_JOB_ID is {os.environ.get('SLURM_JOB_ID', '')!r}"
    try:
        ask_slurm("scontrol", "requeue", job)
    except ValueError as error:
        return f"SLURM job {job} was not requeued: {error}"
    return f"SLURM job {job} requeued"
