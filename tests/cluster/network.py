"""Two network namespaces of this machine as two nodes, each with its own name and a link that can be cut."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.reaper import marked, reaper

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}


def permitted() -> bool:
    """Returns whether this process may make a network namespace."""
    name = f"danube-{uuid.uuid4().hex[:6]}"
    try:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True).returncode == 0
    except OSError:
        return False
    if made:
        subprocess.run(["ip", "netns", "delete", name], check=True)
    return made


class Nodes:
    """Two nodes, node-a and node-b, with an agent of torchrun and one rank each. Use as a context.

    Args:
        directory: for the logs.
        own_names: node → the address that its own name has on it, if not the one by which the other reaches it.
    """

    def __init__(self, directory: Path, own_names: dict[str, str] | None = None) -> None:
        self.directory, self.mark = directory, uuid.uuid4().hex
        self.spaces = {node: f"danube-{self.mark[:6]}-{node}" for node in ADDRESSES}
        self.own_names = own_names or {}
        self.agents: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Nodes":
        # Ends all if this process is killed.
        hosts = (self._hosts(node).parent for node in self.spaces)
        self._reaper = reaper(f"NETWORK_TEST={self.mark}", *hosts, spaces=tuple(self.spaces.values()))
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _make(self) -> None:
        for node, space in self.spaces.items():
            ip("netns", "add", space)
            others = [f"{address} node-{other}" for other, address in ADDRESSES.items() if other != node]
            own = f"{self.own_names.get(node, ADDRESSES[node])} node-{node}"
            hosts = self._hosts(node)
            hosts.parent.mkdir(parents=True)
            hosts.write_text("\n".join(["127.0.0.1 localhost", own, *others, ""]))
        link = {node: f"v{self.mark[:8]}{node}" for node in ADDRESSES}
        ip("link", "add", link["a"], "type", "veth", "peer", "name", link["b"])
        for node, space in self.spaces.items():
            ip("link", "set", link[node], "netns", space, "name", "eth0")
            ip("-n", space, "address", "add", f"{ADDRESSES[node]}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", space, "link", "set", device, "up")

    def _hosts(self, node: str) -> Path:
        # `ip netns exec` shows this file as /etc/hosts.
        return Path("/etc/netns") / self.spaces[node] / "hosts"

    def start(self, *arguments: str, **variables: str) -> None:
        """Starts both agents, by the file that docs/cluster.md shows."""
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            **{"HEAD": ADDRESSES["a"], "NODES": "2", "DEVICES": "1", "NETWORK_TEST": self.mark},
            **variables,
        }
        for number, (node, space) in enumerate(self.spaces.items()):
            inside = f'hostname node-{node} && exec docs/cluster/torchrun.sh "$@"'
            command = ["ip", "netns", "exec", space, "unshare", "--uts", "sh", "-c", inside, "sh", *arguments]
            with self.log(node).open("wb") as log:
                self.agents[node] = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env={**environment, "NODE": str(number)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    def log(self, node: str) -> Path:
        return self.directory / f"node-{node}.log"

    def said(self) -> str:
        return "\n".join(self.log(node).read_text() for node in self.agents)

    def cut(self) -> None:
        """Cuts the link as a broken switch does: packets go out, and nobody answers."""
        for node, other in (("a", "b"), ("b", "a")):
            nobody = ("lladdr", "02:00:00:00:00:99", "dev", "eth0", "nud", "permanent")
            ip("-n", self.spaces[node], "neighbour", "replace", ADDRESSES[other], *nobody)

    def give_up_soon(self) -> None:
        """Has TCP give up a connection after some seconds without an answer, and not after 15 minutes."""
        for space in self.spaces.values():
            ip("netns", "exec", space, "sh", "-c", "echo 3 > /proc/sys/net/ipv4/tcp_retries2")

    def has_ended(self) -> bool:
        return not list(self.processes())

    def processes(self) -> Iterator[int]:
        """Yields what is left of the agents and their ranks."""
        return marked(f"NETWORK_TEST={self.mark}")

    def __exit__(self, *_: object) -> None:
        self._reaper.communicate()  # kills what is left, and removes the namespaces
        for agent in self.agents.values():
            agent.wait()


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, (arguments, done.stderr)
