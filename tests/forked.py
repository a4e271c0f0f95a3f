"""Commands in separate processes that need no start: they are forked from one that has imported the package.

A new interpreter takes five CPU seconds until a run begins. Such a process takes none, and is otherwise the same: it
has its own environment, directory, process group and signals, and nothing of the test's process.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

IMPORTED = [
    "lightning_danube.__main__",
    "lightning_danube.callbacks",
    "lightning_danube.cli.trainer_verbs",
    "lightning_danube.cli.verbs.export",
    "lightning_danube.pretraining",
    "lightning_danube.text.corpora",
    "lightning_danube.tokens.preparation",
    "tensorboard.backend.event_processing.event_accumulator",
    "torch.utils.tensorboard",
]
_CONTEXT = multiprocessing.get_context("forkserver")


class Forked:
    """`python -m lightning_danube` with these arguments. Its methods are those of `subprocess.Popen`.

    Args:
        output: what the process prints on both outputs. A named pipe also serves.
        environment: variables beside those of the test's process.
        program: what it executes instead, with `arguments` in `sys.argv`.
    """

    def __init__(
        self,
        arguments: list[str],
        output: Path,
        cwd: Path,
        environment: Mapping[str, str] | None = None,
        program: str | None = None,
    ) -> None:
        _CONTEXT.set_forkserver_preload(IMPORTED)
        target = (arguments, str(output), str(cwd), {**os.environ, **(environment or {})}, program)
        self._process = _CONTEXT.Process(target=_run, args=target)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        code = self._process.exitcode
        assert code is not None, f"the process still runs after {timeout} s"
        return code

    def send_signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def family_lives(self, seconds: float) -> bool:
        """Whether a process of its group, as its loaders are, still lives after so long."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return False
            time.sleep(0.1)
        return True


def _run(arguments: list[str], output: str, cwd: str, environment: dict[str, str], program: str | None) -> None:
    os.setpgid(0, 0)
    # This process was told "forkserver", as all that it starts would be.
    multiprocessing.set_start_method("fork", force=True)
    with open(output, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    # What an interpreter does with PYTHONPATH at its start.
    sys.path[:0] = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.argv = ["lightning_danube", *arguments]
    # By this name a trainer starts its other ranks: `python -m lightning_danube.__main__`.
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("lightning_danube.__main__")
    if program is not None:
        exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
        return
    from lightning_danube.__main__ import main

    sys.exit(main())
