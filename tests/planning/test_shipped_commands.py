"""Every command for several devices that the project ships passes `plan`'s arithmetic: rows divide, and it fits."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lightning_danube.cli.configs import planned_run
from lightning_danube.planning.accelerators import ACCELERATORS
from lightning_danube.planning.memory import TrainingMemory
from lightning_danube.planning.run import USABLE, layout_of

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "docs" / "cluster"
PAPER = "configs/pretrain/danube3-4b.yaml"


def kubernetes() -> list[str]:
    """The arguments of `fit` in the manifest, with what its torchrun file adds."""
    job = next(one for one in yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text()) if one["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    given = {one["name"]: one["value"] for one in container["env"]}
    assert job["spec"]["completions"] == int(given["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(given["DEVICES"])
    words: list[str] = container["command"] + container["args"]
    program, *arguments = words
    assert program == "docs/cluster/torchrun.sh"
    return [*arguments, "--trainer.num_nodes", given["NODES"], "--trainer.devices", given["DEVICES"]]


def slurm(text: str) -> list[list[str]]:
    """The arguments of `fit` of each line that submits the batch file, with what the file adds."""
    lines = re.findall(r"sbatch (--nodes \d+) docs/cluster/slurm.sbatch (configs[^\n`]*)", text)
    (devices,) = re.findall(r"--ntasks-per-node=(\d+)", (CLUSTER / "slurm.sbatch").read_text())
    found = []
    for nodes, rest in lines:
        config, *more = shlex.split(rest)
        added = ["--trainer.num_nodes", nodes.split()[1], "--trainer.devices", devices]
        found.append(["--config", config, *added, *more])
    return found


def table() -> list[list[str]]:
    """The flags of the table of layouts, for the paper's model and a batch as for so many devices.
    DDP holds the smaller model only."""
    flags = re.findall(r"\| `(--trainer[^`]*)` \|", (ROOT / "docs" / "cluster.md").read_text())
    found = []
    for row in flags:
        config = "configs/pretrain/danube3-500m.yaml" if row.endswith("ddp") else PAPER
        rows = ["--data.init_args.batch_tokens", str(1024 * 8192), "--data.init_args.micro_batch_size", "2"]
        found.append(["--config", config, *shlex.split(row), *rows])
    return found


SHIPPED = [
    kubernetes(),
    *slurm((ROOT / "docs" / "cluster.md").read_text()),
    *slurm((CLUSTER / "slurm.sbatch").read_text()),
    *table(),
]


def test_commands_were_found() -> None:
    assert len(table()) == 4 and len(SHIPPED) == 1 + 1 + 1 + 4


# The ids do not hold the commands: `make mutants` changes these, and then names the tests that failed.
@pytest.mark.parametrize("command", SHIPPED)
def test_a_shipped_command_divides_its_rows_and_fits_on_cards_of_80_gb(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    command = [word for word in command if word not in ("--ckpt_path", "last-or-new")]
    place = command.index("--config")
    run = planned_run([command[place + 1]], command[:place] + command[place + 2 :])
    layout, notes = layout_of(run.trainer)
    assert not notes and layout.devices > 1
    data, model = run.data, run.model
    memory = TrainingMemory(
        model.config,
        rows=data.micro_batch_size,
        context=data.context_length,
        precision="bf16-mixed",
        recompute=model.activation_checkpointing,
        accumulate=data.accumulation(layout.replicas) > 1,
        layout=layout,
        gpu=True,
        compiled=True,
        averages=model.optimizer.averages,
        orthogonalizes=model.optimizer.orthogonalizes,
    )
    assert memory.peak().total <= USABLE * ACCELERATORS["h100"].memory


def test_the_command_that_tries_sharding_on_a_cpu_divides_its_rows_and_has_no_muon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Muon refuses sharded matrices: tests/training/optim/test_muon.py."""
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "cluster.md").read_text().replace("\\\n", " ")
    (command,) = re.findall(r"^lightning-danube fit --config quickstart --name sharded (.*)$", page, re.MULTILINE)
    run = planned_run(["quickstart"], shlex.split(command))
    layout, notes = layout_of(run.trainer)
    assert (layout.replicas, layout.tensor_parallel, layout.by_fsdp, notes) == (2, 1, True, [])
    assert run.data.accumulation(layout.replicas) == 1
    assert not run.model.optimizer.orthogonalizes


@pytest.mark.parametrize("name", ["danube3-500m", "danube3-4b"])
def test_the_papers_configurations_share_the_weights_in_each_node(name: str) -> None:
    def layout(*options: str) -> tuple[int, int, bool, int]:
        found, _ = layout_of(planned_run([f"pretrain/{name}"], options).trainer)
        return found.replicas, found.tensor_parallel, found.by_fsdp, found.shares

    assert layout() == (1, 1, False, 1)
    assert layout("--trainer.devices", "8") == (8, 1, True, 8)
    assert layout("--trainer.devices", "8", "--trainer.num_nodes", "4") == (32, 1, True, 8)
