"""Two nodes, as two agents of torchrun on this machine, started by the file that docs/cluster.md shows."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.probes import losses_of_steps, samples_of_steps
from tests.training.test_world_size import ROUNDING, Sessions, run_in_ranks

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sessions(tiny: Path) -> Sessions:
    return Sessions(tiny)


class Nodes:
    """Two agents with one rank each, in process groups of their own."""

    def __init__(self, directory: Path, arguments: list[str]) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            **{"HEAD": "127.0.0.1", "PORT": str(port), "NODES": "2", "DEVICES": "1"},
            "GLOO_SOCKET_IFNAME": "lo",  # on one machine, its name may be mapped to it
        }
        self.logs = [directory / f"node-{number}.log" for number in range(2)]
        self.agents = [
            subprocess.Popen(
                ["docs/cluster/torchrun.sh", *arguments],
                cwd=ROOT,
                env={**environment, "NODE": str(number)},
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for number, log in enumerate(self.logs)
        ]

    def wait(self, seconds: float) -> list[int]:
        deadline = time.monotonic() + seconds
        try:
            return [agent.wait(max(0.1, deadline - time.monotonic())) for agent in self.agents]
        finally:
            for agent in self.agents:
                if agent.poll() is None:
                    os.killpg(agent.pid, signal.SIGKILL)

    def said(self) -> str:
        return "\n".join(log.read_text() for log in self.logs)


def options(sessions: Sessions, session: str, *more: str) -> list[str]:
    _, *rest = sessions.command(session, session, 4, "--trainer.strategy", "ddp", *more)
    return rest


def test_two_nodes_train_what_one_process_trains(sessions: Sessions) -> None:
    nodes = Nodes(sessions.tiny, options(sessions, "nodes"))
    assert nodes.wait(240) == [0, 0], nodes.said()
    run_in_ranks((1, sessions.command("full", "full", 8)))
    assert samples_of_steps(sessions.notes("nodes")) == samples_of_steps(sessions.notes("full"))
    expected = losses_of_steps(sessions.notes("full"))
    assert losses_of_steps(sessions.notes("nodes")) == pytest.approx(expected, rel=ROUNDING)


def test_a_rank_that_fails_takes_both_nodes_down_and_the_cause_is_said(sessions: Sessions) -> None:
    file = sessions.config("failing")
    probe = "    - class_path: tests.probes.Fail\n      init_args: {what: disk, micro_batch: 3, rank: 1}\n"
    file.write_text(file.read_text() + probe)
    nodes = Nodes(sessions.tiny, ["--config", str(file), "--trainer.strategy", "ddp", *_rows()])
    began = time.monotonic()
    codes = nodes.wait(240)
    assert all(codes), (codes, nodes.said())
    assert time.monotonic() - began < 200
    assert nodes.said().count("error: web.arrow: Input/output error (on rank 1)") == 1, nodes.said()


def _rows() -> list[str]:
    return ["--data.init_args.micro_batch_size", "4"]
