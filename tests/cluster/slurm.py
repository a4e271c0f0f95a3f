"""A real SLURM on this machine: munged, slurmctld and a slurmd for each node, all on the loopback interface."""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from tests.cluster.reaper import kill_marked, marked, reaper

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
BINARIES = f"{os.environ['PATH']}:/usr/sbin:/sbin"

# A node counts as dead after half a minute, so a busy machine has time to answer. A requeued job may start when its
# credentials have expired. A job that is told to end has time to save on a machine with much other work.
SETTINGS = """
ClusterName=danube
SlurmctldHost=HOST(127.0.0.1)
SlurmctldPort=CONTROL
SlurmUser=USER
SlurmdUser=USER
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=DIR/munge.socket,cred_expire=5
StateSaveLocation=DIR/state
SlurmdSpoolDir=DIR/%n
SlurmctldPidFile=DIR/slurmctld.pid
SlurmdPidFile=DIR/%n.pid
SlurmctldLogFile=DIR/slurmctld.log
SlurmdLogFile=DIR/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=1,sched_interval=2,sched_min_interval=1000000
SlurmdParameters=config_overrides
SwitchType=switch/none
MpiDefault=none
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=30
SlurmctldTimeout=60
KillWait=120
JobRequeue=1
MinJobAge=3600
NODES
PartitionName=all Nodes=NAMES Default=YES MaxTime=INFINITE State=UP
"""


PATIENCE = 900
"""Seconds after which a wait fails. It only ends a test that hangs: a busy machine starts a run in some minutes."""
MARK = "DANUBE_TEST_DAEMON"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
"""States of a job that does not continue."""


def missing() -> list[str]:
    """Returns the programs that this machine lacks."""
    return [program for program in PROGRAMS if shutil.which(program, path=BINARIES) is None]


def free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.create_server(("127.0.0.1", 0)))) for _ in range(number)]
        return [one.getsockname()[1] for one in sockets]


def wait_until(holds: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    """Returns the first value that is true."""
    deadline = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.5)
    return value


class Slurm:
    """A cluster of some nodes, each with its own slurmd. Use as a context.

    Args:
        directory: its files. The path is short: it holds a Unix socket.
        nodes: names of the nodes.
    """

    def __init__(self, directory: Path, nodes: tuple[str, ...] = ("node1", "node2", "node3", "node4")) -> None:
        self.directory, self.nodes = directory, nodes
        self.environment = {
            **{
                name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "SRUN_"))
            },
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{BINARIES}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            # All nodes are this machine, and their names are known to SLURM only.
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.mark = f"SLURM_CONF={directory / 'slurm.conf'}"

    def __enter__(self) -> "Slurm":
        # Ends all if this process is killed.
        self._reaper = reaper(self.mark, self.directory)
        control, *ports = free_ports(1 + len(self.nodes))
        same = "NodeHostname=HOST NodeAddr=127.0.0.1 CPUs=4 RealMemory=65536 Gres=gpu:2"
        lines = [f"NodeName={name} Port={port} {same}" for name, port in zip(self.nodes, ports, strict=True)]
        text = SETTINGS.replace("NODES", "\n".join(lines)).replace("NAMES", ",".join(self.nodes))
        user = pwd.getpwuid(os.getuid()).pw_name
        for word, value in {
            "DIR": str(self.directory),
            "HOST": socket.gethostname(),
            "CONTROL": str(control),
            "USER": user,
        }.items():
            text = re.sub(rf"\b{word}\b", value, text)
        (self.directory / "slurm.conf").write_text(text)
        # Two GPUs for SLURM to count. A GPU has to have a file.
        (self.directory / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        (self.directory / "state").mkdir()
        key = self.directory / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        try:
            self._start(
                "munged", "munged", "--foreground", "--force", f"--socket={self.directory}/munge.socket",
                f"--key-file={key}", f"--pid-file={self.directory}/munged.pid",
                f"--seed-file={self.directory}/munged.seed", f"--log-file={self.directory}/munged.log",
            )  # fmt: skip
            wait_until((self.directory / "munge.socket").exists, "munged")
            self._start("slurmctld", "slurmctld", "-D")
            for node in self.nodes:
                self.start_node(node)
            wait_until(lambda: all(self.state_of_node(node) == "IDLE" for node in self.nodes), "idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(reversed(self._daemons)):
            self._stop(name)
        kill_marked(self.mark)
        self._reaper.communicate()

    def _start(self, name: str, *command: str) -> None:
        # SLURM's own processes of a node inherit the mark, and those of a job have SLURMD_NODENAME.
        environment = {**self.environment, MARK: name}
        with (self.directory / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def _stop(self, name: str, number: int = signal.SIGKILL) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(number)
        daemon.wait()

    # --- nodes --------------------------------------------------------------------------------------------------------

    def start_node(self, node: str) -> None:
        (self.directory / node).mkdir(exist_ok=True)
        self._start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node: str) -> None:
        """Kills a node's slurmd and all that it has started, as a power cut does: nobody reports what has ended."""
        for variable in (f"{MARK}={node}", f"SLURMD_NODENAME={node}"):
            for process in self.processes(variable):
                os.kill(process, signal.SIGKILL)
        self._daemons.pop(node).wait()

    def processes(self, variable: str) -> Iterator[int]:
        """Yields the processes that belong to this cluster, and have a variable in their environment."""
        return marked(self.mark, variable)

    def state_of_node(self, node: str) -> str:
        return self._shown("node", node).get("State", "")

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def call(self, *command: str, check: bool = True) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0 or not check, done.stderr
        return done.stdout

    def _shown(self, what: str, name: str) -> dict[str, str]:
        said = self.call("scontrol", "show", "--oneliner", what, name, check=False)
        return {key: value for key, _, value in (word.partition("=") for word in said.split())}

    def job(self, job: str) -> dict[str, str]:
        """Returns what SLURM knows of a job, by its own names, such as "JobState" and "ExitCode"."""
        return self._shown("job", job)

    def submit(self, *arguments: str, directory: Path, **variables: str) -> str:
        """Submits a batch script, and returns the job's number."""
        done = subprocess.run(
            ["sbatch", "--parsable", *arguments],
            env={**self.environment, **variables}, cwd=directory, capture_output=True, text=True, timeout=PATIENCE,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def has_ended(self, job: str) -> bool:
        return self.job(job).get("JobState") in ENDED

    def end_time_of(self, job: str) -> None:
        """Has SLURM send the signal of a job's time limit, two minutes before the end as the batch script asks for.

        Waits until the job is requeued. After the signal the job gets more time, because a busy machine saves slowly.
        """
        restarts = self.restarts(job)
        minutes = self._run_time(job) // 60 + 3
        self.call("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
        # SLURM looks at the limits every 30 s, and sends the signal up to so much too early.
        told = lambda: self.restarts(job) > restarts or 60 * minutes - self._run_time(job) < 90  # noqa: E731
        wait_until(told, "the signal of the time limit")
        self.call("scontrol", "update", f"JobId={job}", "TimeLimit=120")
        wait_until(lambda: self.restarts(job) > restarts, "the next start of the job")

    def restarts(self, job: str) -> int:
        """Returns how often a job was requeued."""
        return int(self.job(job)["Restarts"])

    def _run_time(self, job: str) -> int:
        """Returns for how many seconds a job has run since its last start."""
        hours, minutes, seconds = self.job(job)["RunTime"].split(":")
        return 3600 * int(hours) + 60 * int(minutes) + int(seconds)

    def wait(self, job: str, *states: str, seconds: float = PATIENCE) -> dict[str, str]:
        """Returns what SLURM knows of a job as soon as it is in one of the states, or in any in which it has ended."""
        wanted = states or ENDED
        return wait_until(
            lambda: (shown := self.job(job)).get("JobState") in wanted and shown, f"job {job} {' or '.join(wanted)}",
            seconds,
        )  # fmt: skip
