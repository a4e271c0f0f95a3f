"""Ends what a test has started, when the test's process is gone in whatever way.

    python reaper.py NAME=VALUE DIRECTORY… [--spaces SPACE…]

Reads its standard input to the end, which comes when the process that holds the other end of the pipe ends or is
killed. Then it kills every process with this variable in its environment, and removes the directories and the network
namespaces. A daemon, or a job of a SLURM, has no parent that would end it.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def marked(*variables: str) -> Iterator[int]:
    """Yields the processes that have all these variables, as NAME=VALUE, in their environment."""
    wanted = {variable.encode() for variable in variables}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                environment = set((entry / "environ").read_bytes().split(b"\0"))
            except OSError:
                continue
            if wanted <= environment:
                yield int(entry.name)


def kill_marked(*variables: str) -> None:
    """Kills these processes, and those that they start meanwhile."""
    while left := list(marked(*variables)):
        for process in left:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def reaper(variable: str, *directories: Path, spaces: tuple[str, ...] = ()) -> "subprocess.Popen[bytes]":
    """Starts this file as a process. Its standard input has to stay open for as long as nothing is to be ended."""
    command = [sys.executable, "-S", __file__, variable, *map(str, directories), "--spaces", *spaces]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def main(variable: str, *arguments: str) -> None:
    sys.stdin.buffer.read()
    kill_marked(variable)
    at = arguments.index("--spaces")
    for space in arguments[at + 1 :]:
        subprocess.run(["ip", "netns", "delete", space], capture_output=True)
    for directory in arguments[:at]:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
