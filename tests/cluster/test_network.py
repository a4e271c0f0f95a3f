"""Two nodes on a link that can be cut, and with names that lead nowhere: all ends soon, and one line says why.

torchrun is started by docs/cluster/torchrun.sh, as on a cluster.
"""

from pathlib import Path

import pytest

from tests.cluster.network import Nodes, permitted
from tests.cluster.runs import TinyRun
from tests.cluster.slurm import wait_until

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not permitted(), reason="network namespaces are not permitted here"),
]

DDP = ("--trainer.strategy=lightning.pytorch.strategies.DDPStrategy",)
SHARDED = (
    "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
    "--trainer.strategy.data_parallel_size=2",
    "--trainer.strategy.tensor_parallel_size=1",
)
PATIENCE = 60
"""Time-out of collective operations in seconds. A rank may be so much later than another on a busy machine."""
WAITED = f"error: waited {PATIENCE} s for another rank, which hangs, is much slower or is cut off, and ended all"
BEFORE_TCP = 600
"""Seconds in which all have to end. TCP itself gives up after 15 minutes, which the time-out of a run must not need."""


def timeout(seconds: int) -> str:
    return f"--trainer.strategy.timeout=0:{seconds // 60:02}:{seconds % 60:02}"


def cut_at_step_7(nodes: Nodes, run: TinyRun, *options: str) -> None:
    run.halt(step=7)
    nodes.start(f"--config={run.config}", *options)
    wait_until(lambda: run.has_halted(step=7) or nodes.has_ended(), "halted ranks")
    assert not nodes.has_ended(), nodes.said()
    nodes.cut()
    (run.halts(step=7) / "go").touch()


def assert_ended(nodes: Nodes, seconds: float) -> None:
    try:
        wait_until(nodes.has_ended, "the end of all ranks and both agents", seconds)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{nodes.said()}") from None
    assert all(agent.wait() for agent in nodes.agents.values()), "exit codes"


@pytest.mark.parametrize("strategy", [DDP, SHARDED], ids=["ddp", "sharded"])
def test_a_cut_link_ends_all_ranks_and_both_agents(texts: Path, tmp_path: Path, strategy: tuple[str, ...]) -> None:
    with Nodes(tmp_path) as nodes:
        cut_at_step_7(nodes, TinyRun(texts, tmp_path), *strategy, timeout(PATIENCE))
        assert_ended(nodes, BEFORE_TCP)
        for node in nodes.agents:
            assert nodes.log(node).read_text().count(WAITED) == 1, nodes.said()


def test_a_connection_that_tcp_gives_up_ends_all_as_well(texts: Path, tmp_path: Path) -> None:
    with Nodes(tmp_path) as nodes:
        nodes.give_up_soon()
        cut_at_step_7(nodes, TinyRun(texts, tmp_path), *DDP, timeout(900))
        assert_ended(nodes, BEFORE_TCP)
        line = "error: lost the connection to another rank (Connection timed out), and ended all: see whether its node"
        for node in nodes.agents:
            assert nodes.log(node).read_text().count(line) == 1, nodes.said()


def test_a_node_whose_name_leads_to_itself_is_told(texts: Path, tmp_path: Path) -> None:
    """As Debian maps it. The other node waits for it, and ends with the time-out."""
    with Nodes(tmp_path, own_names={"b": "127.0.1.1"}) as nodes:
        nodes.start(f"--config={TinyRun(texts, tmp_path).config}", *DDP, timeout(PATIENCE))
        assert_ended(nodes, BEFORE_TCP)
        line = (
            "error: --trainer.num_nodes is 2, and node-b, the name of this machine, stands for 127.0.1.1: no other node"
        )
        assert nodes.log("b").read_text().count(line) == 1, nodes.said()
        assert nodes.log("a").read_text().count(WAITED) == 1, nodes.said()


def test_with_a_named_interface_such_nodes_train(texts: Path, tmp_path: Path) -> None:
    with Nodes(tmp_path, own_names={"a": "127.0.1.1", "b": "127.0.1.1"}) as nodes:
        nodes.start(f"--config={TinyRun(texts, tmp_path).config}", *SHARDED, GLOO_SOCKET_IFNAME="eth0")
        wait_until(nodes.has_ended, "the end")
        assert [agent.wait() for agent in nodes.agents.values()] == [0, 0], nodes.said()
