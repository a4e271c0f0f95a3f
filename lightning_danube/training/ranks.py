"""The processes of one run ("ranks") on a machine: if one fails, all end soon, and one of them prints the cause.

Without this module, the other ranks wait in a collective operation until it times out after half an hour. Or they fail
there with a network error that does not name the cause.
"""

from __future__ import annotations

import ipaddress
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch.distributed import DistError

from lightning_danube.signals import EXIT_STOPPED, SIGNALS, Stopped
from lightning_danube.terminal import tell
from lightning_danube.training.precision import RANK_ZEROS

LAUNCHER = "LIGHTNING_DANUBE_LAUNCHER"
"""Environment variable of a rank that rank zero has started: the process id of rank zero."""

SECONDS_OF_SILENCE = 10.0
"""How long a failed rank waits before it prints its error: rank zero often fails for the same cause and prints it."""

SECONDS_OF_DOUBT = 3.0
"""How long rank zero waits to see whether its error only follows from the end of another rank."""

SECONDS_TO_END = 30.0
"""How long rank zero may take to end after an error; on a GPU it can wait for work that no peer will finish."""

_POLL_SECONDS = 0.2


class RankLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks of this machine like Lightning's launcher, and ends them when one rank fails.

    Lightning's launcher kills rank zero, without a message, up to five seconds after another rank has failed. When rank
    zero itself fails or finishes, Lightning's launcher leaves the other ranks running.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._over = threading.Event()
        self._ending = threading.Lock()

    @staticmethod
    def install(trainer: Trainer) -> None:
        """Replaces Lightning's launcher, if that would start processes."""
        launcher = trainer.strategy.launcher
        if type(launcher) is _SubprocessScriptLauncher:
            trainer.strategy._launcher = RankLauncher(
                launcher.cluster_environment, launcher.num_processes, launcher.num_nodes
            )

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:
        if self.cluster_environment.creates_processes_externally:
            return super().launch(function, *args, trainer=trainer, **kwargs)
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        os.environ[LAUNCHER] = str(os.getpid())
        if trainer is not None:
            os.environ[RANK_ZEROS] = str(trainer.precision)
        self._call_children_scripts()
        del os.environ[LAUNCHER]
        os.environ.pop(RANK_ZEROS, None)
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        with SIGNALS.ending_first(self._end_at_once):
            return self._answer_for_all(function, *args, **kwargs)

    def _answer_for_all(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
        except SystemExit as stop:
            if isinstance(stop, Stopped) and stop.code != EXIT_STOPPED:
                self._end_the_others(stop)  # there is nothing to save, and perhaps only this rank got the signal
            else:
                # All ranks were told to stop, and leave at the same step.
                self._wait_for_the_others()
            raise
        except BaseException as error:
            explain_silence(error)
            self._end_the_others(error)
            raise
        self._wait_for_the_others()
        return result

    def _end_at_once(self) -> None:
        self._over.set()
        self.kill(signal.SIGKILL)

    def _watch(self) -> None:
        while not self._over.wait(_POLL_SECONDS):
            for local_rank, process in enumerate(self.procs, start=1):
                if process.poll():
                    self._end_because_of(local_rank, process.returncode)

    def _end_because_of(self, local_rank: int, code: int) -> None:
        """Ends this process, whose main thread may wait forever, and all processes that it started."""
        with self._ending:
            if self._over.is_set():
                return  # ended by this process
            self.kill(signal.SIGKILL)
            sys.stdout.flush()
            if code < 0:  # otherwise the rank has printed its error
                rank = self.cluster_environment.node_rank() * self.num_processes + local_rank
                ranks = self.num_nodes * self.num_processes
                tell(f"error: rank {rank} of {ranks} {_ended_by(-code)}")
            os._exit(code if code > 0 else 128 - code)

    def _end_the_others(self, error: BaseException) -> None:
        """Ends the other ranks at once, and later this process if it does not end by itself."""
        if isinstance(error, RuntimeError) and (_end_of_a_peer(error) or not hasattr(error, "user_message")):
            # A collective operation raises this if a peer has ended. `_watch` then ends this process during the sleep,
            # usually at once. On a busy machine a peer can close its connections long before its process ends.
            time.sleep(SECONDS_TO_END if _is_of_the_network(error) else SECONDS_OF_DOUBT)
        with self._ending:
            self._over.set()
            self.kill(signal.SIGKILL)

        def end() -> None:
            tell(f"error: {' '.join(str(error).split())}")
            os._exit(1)

        last_resort = threading.Timer(SECONDS_TO_END, end)
        last_resort.daemon = True
        last_resort.start()

    def _wait_for_the_others(self) -> None:
        deadline = time.monotonic() + SECONDS_TO_END
        for local_rank, process in enumerate(self.procs, start=1):
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                break
            if code:
                self._end_because_of(local_rank, code)
        with self._ending:
            self._over.set()
            # The work is done: do not wait for ranks that have not ended by now.
            self.kill(signal.SIGKILL)


def end_with_launcher() -> None:
    """Ends this process when rank zero, which started it, is gone. Does nothing in other processes."""
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is not None:
        threading.Thread(target=_watch_launcher, args=(int(launcher),), name="launcher", daemon=True).start()


def _watch_launcher(launcher: int) -> NoReturn:
    while os.getppid() == launcher:
        time.sleep(_POLL_SECONDS)
    if os.environ.get("LOCAL_RANK") == "1":
        # In every other case rank zero ends the other ranks before itself.
        tell(f"error: rank 0 {_ended_by(None)}")
    os._exit(1)


def explain_silence(error: BaseException) -> None:
    """Adds a clear message to the error of a rank that waited in vain for another, at the start or later, or lost the
    connection to it.

    The errors of torch.distributed name sockets and keys of its store.
    """
    if not isinstance(error, RuntimeError):
        return
    waited = re.search(r"Timed out waiting (\d+)ms|wait timeout after (\d+)ms", str(error))
    # TCP gives up a connection by itself, after about 15 minutes without an answer.
    lost = re.search(r"Connection timed out|No route to host|Network is unreachable", str(error))
    go_on = "resume from the last checkpoint with --ckpt_path last"
    # Before the ranks know each other, all of them connect to rank zero.
    unreached = re.search(
        r"client socket has timed out after (\d+)ms while trying to connect to \((.+?), (\d+)\)", str(error)
    )
    absent = re.search(r"Timed out after (\d+) seconds waiting for clients. (\d+)/(\d+) clients joined", str(error))
    if unreached:
        error.user_message = (  # type: ignore[attr-defined]
            f"tried {int(unreached[1]) / 1000:g} s to connect to rank zero at {unreached[2]}:{unreached[3]}: see "
            "whether it has started, and whether this node can reach it there (MASTER_ADDR, MASTER_PORT), or raise "
            "trainer.strategy.timeout"
        )
    elif absent:
        error.user_message = (  # type: ignore[attr-defined]
            f"waited {absent[1]} s for all ranks to start, and {absent[2]} of {absent[3]} did: see whether the others "
            "have started and can reach this node (MASTER_ADDR, MASTER_PORT), or raise trainer.strategy.timeout"
        )
    elif waited:
        error.user_message = (  # type: ignore[attr-defined]
            f"waited {int(waited[1] or waited[2]) / 1000:g} s for another rank, which hangs, is much slower or is cut "
            "off, and ended all: see what it waits for (py-spy dump shows that), or raise trainer.strategy.timeout; "
            f"{go_on}"
        )
    elif lost and _is_of_the_network(error):
        error.user_message = (  # type: ignore[attr-defined]
            f"lost the connection to another rank ({lost[0]}), and ended all: see whether its node and the network are "
            f"there; {go_on}"
        )
    elif ended := _end_of_a_peer(error):
        error.user_message = (  # type: ignore[attr-defined]
            f"another rank has ended ({ended}), so this rank ends too: see what that rank printed; {go_on}"
        )


def check_host_name(nodes: int) -> None:
    """Checks, for a run on several nodes, that the others can reach this one under the address that gloo takes.

    gloo takes the first address of the host's name, and 127.0.0.1 if there is none. Debian maps the name of a host to
    127.0.1.1. Ranks of other nodes would then connect to themselves, and wait.

    Raises:
        ValueError: no other node can reach that address.
    """
    if nodes < 2 or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        address = ""
    if address and not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return
    raise ValueError(
        f"trainer.num_nodes is {nodes}, and {name}, the name of this machine, stands for {address or 'no address'}: no "
        "other node can reach it there. Set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface of the network "
        "between the nodes, such as eth0, or correct the name in /etc/hosts"
    )


def this_rank() -> int:
    """Returns the rank of this process from Lightning, before there is a trainer."""
    return int(getattr(rank_zero_only, "rank", 0))


def let_rank_zero_speak(rank: int, error: Exception) -> None:
    """Delays an error of a rank other than zero: rank zero often has the same error, and ends this process first."""
    explain_silence(error)
    if rank:
        time.sleep(SECONDS_OF_SILENCE)
        error.add_note(f"on rank {rank}")


def _is_of_the_network(error: RuntimeError) -> bool:
    """Returns whether a back end of torch.distributed raised the error. gloo's errors have no class of their own."""
    return isinstance(error, DistError) or "gloo" in str(error).lower()


def _end_of_a_peer(error: RuntimeError) -> str | None:
    """Returns what a collective operation says when the process of another rank is gone; None for other errors."""
    found = re.search(r"Connection (?:closed|reset) by peer|Broken pipe|remote process exited", str(error))
    return found[0] if found and _is_of_the_network(error) else None


def _ended_by(number: int | None) -> str:
    name = next((known.name for known in signal.Signals if known == number), f"signal {number}")
    by = "" if number is None else f" by {name}"
    memory = ", as when memory runs out" if number in (None, signal.SIGKILL) else ""
    return f"was ended{by}{memory}, and the other ranks with it: resume from the last checkpoint with --ckpt_path last"
