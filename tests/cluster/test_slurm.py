"""docs/cluster/slurm.sbatch on a real SLURM: whatever ends a job, the run ends with the losses of an undisturbed one.

All nodes are this machine: see tests/cluster/slurm.py.
"""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from lightning_danube.checkpoints.runs import newest_checkpoint, read_step
from lightning_danube.checkpoints.sharded import consolidated
from lightning_danube.checkpoints.single import DurableCheckpointIO
from tests.cluster.runs import TinyRun
from tests.cluster.slurm import ROOT, Slurm, missing, wait_until
from tests.conftest import write_tiny

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(bool(missing()), reason=f"SLURM is not installed: {', '.join(missing())}"),
]

SHARDED = (
    "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
    "--trainer.strategy.data_parallel_size=2",
    "--trainer.strategy.tensor_parallel_size=1",
)
DDP = ("--trainer.strategy=ddp",)
LAST_STEP = 26


class Cluster:
    """Jobs of tiny runs, one rank on each of two nodes."""

    def __init__(self, slurm: Slurm, texts: Path, directory: Path) -> None:
        self.slurm, self.directory, self.run = slurm, directory, TinyRun(texts, directory)
        self.run.add("LossesOfSteps", directory=str(directory / "notes"))
        self.strategy: tuple[str, ...] = DDP
        self.job = ""

    def submit(self, *options: str, **variables: str) -> None:
        resources = ("--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=2", "--time=120")
        self.job = self.slurm.submit(
            *options, *resources, "--output=job.log",
            str(ROOT / "docs/cluster/slurm.sbatch"), str(self.run.config), *self.strategy,
            directory=self.directory, **variables,
        )  # fmt: skip

    def halted(self, where: str = "on_train_batch_start", step: int = 0) -> dict[int, tuple[int, str]]:
        """Waits until both ranks wait. Returns rank → its process and node."""
        try:
            wait_until(lambda: self.run.has_halted(where, step) or self.slurm.has_ended(self.job), f"halt in {where}")
            assert self.run.has_halted(where, step), "the job has ended"
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.said()}") from None
        found = {}
        for rank in (0, 1):
            process, node = (self.run.halts(where, step) / f"halted-{rank}").read_text().split()
            found[rank] = int(process), node
        return found

    def ends(self, state: str, restarts: int) -> dict[str, str]:
        """Waits until the job has ended in this state, after so many restarts."""
        shown = self.slurm.wait(self.job)
        assert (shown["JobState"], shown["Restarts"]) == (state, str(restarts)), (shown, self.said())
        return shown

    def said(self) -> str:
        log = self.directory / "job.log"
        return log.read_text() if log.exists() else ""

    def losses(self) -> list[tuple[int, float]]:
        """Step and loss, also of steps that were repeated."""
        return [tuple(json.loads(line)) for line in (self.directory / "notes" / "losses.jsonl").open()]

    def version(self, number: int = 0) -> Path:
        return self.directory / "runs" / "tiny" / f"version_{number}"

    def newest(self) -> int:
        """Returns the number of the newest version."""
        return max(int(path.name.removeprefix("version_")) for path in self.version().parent.glob("version_*"))

    def weights(self, version: int = 0) -> dict[str, torch.Tensor]:
        path = newest_checkpoint(self.version(version))
        assert path is not None and read_step(path) == LAST_STEP
        loaded = consolidated(path) if path.is_dir() else DurableCheckpointIO().load_checkpoint(path)
        state: dict[str, torch.Tensor] = loaded["state_dict"]
        return state

    def equals(self, undisturbed: "Cluster", version: int = 0) -> None:
        expected = dict(undisturbed.losses())
        assert len(expected) == LAST_STEP
        found = self.losses()
        assert {step for step, _ in found} == set(expected), "every step"
        assert all(loss == expected[step] for step, loss in found), "bit by bit"
        mine, theirs = self.weights(version), undisturbed.weights()
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@contextmanager
def dead(slurm: Slurm, node: str) -> Iterator[str]:
    """Kills a node, and starts it again at the end."""
    slurm.kill_node(node)
    try:
        yield node
    finally:
        slurm.start_node(node)
        wait_until(lambda: slurm.state_of_node(node) == "IDLE", "the node again")


@pytest.fixture
def cluster(slurm: Slurm, texts: Path, tmp_path: Path) -> Cluster:
    return Cluster(slurm, texts, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(slurm: Slurm, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    one = Cluster(slurm, texts, tmp_path_factory.mktemp("undisturbed"))
    one.submit()
    one.ends("COMPLETED", 0)
    return one


def test_a_run_goes_on_when_its_time_is_over(cluster: Cluster, undisturbed: Cluster) -> None:
    """Before the first step, between two steps, after the last step, and when all is done."""
    slurm = cluster.slurm
    cluster.run.halt("setup")
    cluster.run.halt(step=7)
    cluster.run.halt("on_train_end")
    cluster.run.halt("teardown")
    cluster.submit()

    cluster.halted("setup")
    # srun has taken --cpus-per-task: two for each of two ranks.
    assert re.search(r"\bCPUs=4 Tasks=2\b", slurm.call("scontrol", "show", "--oneliner", "step", f"{cluster.job}.0"))
    slurm.end_time_of(cluster.job)
    requeued = f"SLURM job {cluster.job} requeued"
    wait_until(lambda: cluster.said().count(requeued) == 1, "the line of the first restart")

    cluster.halted(step=7)
    slurm.end_time_of(cluster.job)
    wait_until(lambda: cluster.said().count(requeued) == 2, "the line of the second restart")
    said = cluster.said()
    # SLURM tells both tasks, and one speaks.
    assert said.count("SIGUSR1: saving after this optimizer step, then stopping\n") == 1
    (stopped,) = re.findall(r"^stopped after step (\d+), saved: resume with --ckpt_path last$", said, re.MULTILINE)
    assert stopped in ("8", "9")

    for where in ("on_train_end", "teardown"):
        cluster.halted(where)
        slurm.call("scancel", "--signal=USR1", cluster.job)
    time.sleep(2)  # nothing answers a second signal: it has come by now
    (cluster.run.halts("teardown") / "go").touch()
    cluster.ends("COMPLETED", 2)
    assert [step for step, _ in cluster.losses()] == list(range(1, LAST_STEP + 1)), "nothing was done twice"
    cluster.equals(undisturbed, cluster.newest())


def test_a_run_goes_on_when_a_rank_and_then_a_node_dies(cluster: Cluster, undisturbed: Cluster) -> None:
    cluster.run.halt(step=7)
    cluster.run.halt(step=12)
    cluster.submit()

    process, failed = cluster.halted(step=7)[1]
    os.kill(process, signal.SIGKILL)
    line = f"SLURM job {cluster.job} requeued after failure 1 of at most 10; {failed} has failed, and is left out"
    wait_until(lambda: line in cluster.said(), "the line of the failure")
    (record,) = (cluster.directory / "runs" / "tiny").glob("failures_*.jsonl")
    assert json.loads(record.read_text())["checkpoint"].endswith("/checkpoints/step_00000005.ckpt")

    with dead(cluster.slurm, cluster.halted(step=12)[1][1]) as node:
        shown = cluster.ends("COMPLETED", 2)
        assert shown["ExcNodeList"] == failed
        last = cluster.slurm.call("scontrol", "show", "hostnames", shown["NodeList"]).split()
        assert not {failed, node} & set(last)
    assert "stage_1_foundation_step_00000012.ckpt; the run continues in the same version" in cluster.said()
    cluster.equals(undisturbed)


def test_a_node_that_dies_before_the_first_checkpoint(cluster: Cluster, undisturbed: Cluster) -> None:
    cluster.run.save_every(1000)
    cluster.run.halt(step=3)
    cluster.submit()
    with dead(cluster.slurm, cluster.halted(step=3)[1][1]):
        cluster.ends("COMPLETED", 1)
    assert "tiny: the run starts from the beginning" in cluster.said()
    cluster.equals(undisturbed, version=1)


def test_a_rank_that_dies_at_the_same_step_again_ends_the_job(cluster: Cluster) -> None:
    cluster.run.add("Fail", what="kill", micro_batch=7, rank=1)
    cluster.submit()
    cluster.ends("FAILED", 1)
    said = cluster.said()
    assert said.count("requeued after failure 1 of at most 10") == 1
    last = cluster.version() / "checkpoints" / "step_00000005.ckpt"
    assert f"SLURM job {cluster.job} is not requeued: its run has made no progress since {last}" in said


def test_a_mistake_ends_the_job(cluster: Cluster) -> None:
    cluster.strategy = (*DDP, "--data.init_args.batch_tokens=32")
    cluster.submit()
    cluster.ends("FAILED", 0)
    said = cluster.said()
    assert "error: a step of 1 rows" in said
    assert f"is not requeued: its run has no checkpoint under {cluster.directory / 'runs' / 'tiny'} yet" in said


def test_a_cancelled_job_is_saved_and_stays_cancelled(cluster: Cluster, undisturbed: Cluster) -> None:
    cluster.run.halt(step=7)
    cluster.submit()
    cluster.halted(step=7)
    cluster.slurm.call("scancel", cluster.job)
    cluster.ends("CANCELLED", 0)
    wait_until(lambda: re.search(r"^stopped after step [89], saved", cluster.said(), re.MULTILINE), "the last line")
    wait_until(lambda: all(cluster.slurm.state_of_node(node) == "IDLE" for node in cluster.slurm.nodes), "idle nodes")
    cluster.submit(RESUME="1")
    cluster.ends("COMPLETED", 0)
    cluster.equals(undisturbed)


def test_an_array_prepares_and_two_nodes_share_the_weights(slurm: Slurm, tmp_path: Path) -> None:
    texts = write_tiny(tmp_path)
    command = f"python -m lightning_danube prepare --config {texts}/tiny.yaml --shard $SLURM_ARRAY_TASK_ID/2"
    array = slurm.submit("--array=1-2", "--output=array-%a.log", "--wrap", command, directory=tmp_path)
    for task in ("1", "2"):
        shown = slurm.wait(f"{array}_{task}")
        assert shown["JobState"] == "COMPLETED", (tmp_path / f"array-{task}.log").read_text()
    runs = []
    for name in ("undisturbed", "disturbed"):
        (tmp_path / name).mkdir()
        runs.append(Cluster(slurm, texts, tmp_path / name))
        runs[-1].strategy = SHARDED
    undisturbed, disturbed = runs
    undisturbed.submit()
    undisturbed.ends("COMPLETED", 0)
    disturbed.run.halt(step=7)
    disturbed.submit()
    disturbed.halted(step=7)
    slurm.end_time_of(disturbed.job)
    disturbed.ends("COMPLETED", 1)
    assert (disturbed.version() / "checkpoints" / "stage_3_finish_step_00000026.ckpt").is_dir()
    disturbed.equals(undisturbed)
