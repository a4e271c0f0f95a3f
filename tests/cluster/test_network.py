"""Two nodes on a link that can be cut, and with names that lead nowhere: all ends soon, and one line says why.

torchrun is started by docs/cluster/torchrun.sh, as on a cluster.
"""

import time
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
TIMEOUT = 20


@pytest.mark.parametrize("strategy", [DDP, SHARDED], ids=["ddp", "sharded"])
def test_a_cut_link_ends_all_ranks_and_both_agents(texts: Path, tmp_path: Path, strategy: tuple[str, ...]) -> None:
    run = TinyRun(texts, tmp_path)
    run.halt(step=7)
    with Nodes(tmp_path) as nodes:
        nodes.start(f"--config={run.config}", *strategy, f"--trainer.strategy.timeout=0:00:{TIMEOUT}")
        wait_until(lambda: all(mark.exists() for mark in run.marks()), "halted ranks", 240)
        nodes.cut()
        (tmp_path / "halts" / "go").touch()
        began = time.monotonic()
        while list(nodes.processes()) and time.monotonic() - began < 300:
            time.sleep(1)
            print(round(time.monotonic() - began), list(nodes.processes()))
        print(nodes.said())
        assert 0
