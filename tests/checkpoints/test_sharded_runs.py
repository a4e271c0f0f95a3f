"""Sharded runs are the runs of one process: losses, weights and optimizer state to rounding, order and ledger exactly,
also when a run resumes with other sharding, and from either kind of checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_danube.__main__ import main
from lightning_danube.checkpoints.files import damage, remove_checkpoint
from lightning_danube.checkpoints.single import DurableCheckpointIO
from lightning_danube.weights.loading import load_decoder
from tests.pretraining.test_run import scalars
from tests.training.test_world_size import LAST, ROOT, Sessions, assert_same_run, run_in_ranks

pytestmark = pytest.mark.slow
LAST_FLAGS = ["--ckpt_path", "last"]


def sharded(replicas: int, devices: int, *, together: bool = True) -> list[str]:
    strategy = "--trainer.strategy"
    return [
        *(strategy, "lightning.pytorch.strategies.ModelParallelStrategy"),
        *(f"{strategy}.data_parallel_size", str(replicas)),
        *(f"{strategy}.tensor_parallel_size", str(devices)),
        *(f"{strategy}.save_distributed_checkpoint", str(together).lower()),
    ]


@pytest.fixture
def sessions(tiny: Path) -> Sessions:
    sessions = Sessions(tiny)
    # Lightning's strategy refuses the word, and takes the plugin that it stands for.
    plugin = "plugins: {class_path: lightning.pytorch.plugins.DoublePrecision}"
    sessions._config = sessions._config.replace("precision: 64-true", plugin)
    return sessions


@pytest.mark.parametrize("together", [False, True], ids=["one file", "a part of each rank"])
def test_from_fsdp_to_one_process_to_tensor_parallel_nothing_changes(sessions: Sessions, together: bool) -> None:
    run_in_ranks(
        (1, sessions.command("full", "full", 8)),
        (2, sessions.command("first", "moved", 2, "--trainer.max_steps", "8", *sharded(2, 1, together=together))),
        (1, sessions.command("second", "moved", 8, *LAST_FLAGS, "--trainer.max_steps", "16")),
        (2, sessions.command("third", "moved", 4, *LAST_FLAGS, *sharded(1, 2, together=together))),
    )
    assert_same_run(sessions, "moved", ("first", 0), ("second", 8), ("third", 16))
    assert (sessions.run("moved") / LAST).is_dir() == together
    norms = [scalars(sessions.run(name), "optimizer/gradient_norm") for name in ("full", "moved")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-6)  # logged in float32


def test_four_processes_in_a_grid_and_on_two(sessions: Sessions) -> None:
    run_in_ranks(
        (1, sessions.command("full", "full", 8)),
        (4, sessions.command("first", "moved", 2, "--trainer.max_steps", "8", *sharded(2, 2))),
        (2, sessions.command("second", "moved", 4, *LAST_FLAGS, *sharded(2, 1))),
    )
    assert_same_run(sessions, "moved", ("first", 0), ("second", 8), devices=(4, 2))


def test_from_groups_that_each_have_a_copy_to_one_process_nothing_changes(sessions: Sessions) -> None:
    """4 replicas in groups of 2, with two micro-batches a step; the third session reads what one process wrote."""
    groups = ["--trainer.strategy", "lightning_danube.checkpoints.strategy.ShardedStrategy", *sharded(4, 1)[2:]]
    groups += ["--trainer.strategy.shard_size", "2"]
    run_in_ranks(
        (1, sessions.command("full", "full", 8)),
        (4, sessions.command("first", "moved", 1, "--trainer.max_steps", "8", *groups)),
        (1, sessions.command("second", "moved", 8, *LAST_FLAGS, "--trainer.max_steps", "16")),
        (4, sessions.command("third", "moved", 1, *LAST_FLAGS, *groups, "--trainer.strategy.reduce_once", "false")),
    )
    assert_same_run(sessions, "moved", ("first", 0), ("second", 8), ("third", 16), devices=(4, 1, 4))


def test_a_sharded_checkpoint_is_whole_and_plain_and_can_be_exported(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit = ["fit", "--config", str(tiny / "tiny.yaml"), "--name", "parts", "--trainer.precision", "bf16-mixed"]
    run_in_ranks((2, [*fit, "--data.init_args.micro_batch_size", "2", *sharded(2, 1)]))
    run = tiny / "runs" / "parts" / "version_0"
    checkpoint = run / LAST
    assert checkpoint.is_dir() and damage(checkpoint) is None
    assert not list((run / "checkpoints").glob(".*.partial"))
    # Weights in one piece, without a process group.
    assert main(["export", "--weights", str(run), "--out", str(tmp_path / "hf")]) == 0
    whole = DurableCheckpointIO().load_checkpoint(checkpoint)["state_dict"]
    exported = load_decoder(str(tmp_path / "hf"), dtype="float32").state_dict()
    assert {f"decoder.{name}" for name in exported} == whole.keys()
    assert all(torch.equal(tensor, whole[f"decoder.{name}"]) for name, tensor in exported.items())
    # A part cut short is damage; the one before it is taken.
    part = next(checkpoint.glob("*.distcp"))
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    assert damage(checkpoint) == f"{part.name}: {len(content) - 1:,} bytes, {len(content):,} were saved"
    assert main([*fit, *LAST_FLAGS]) == 0
    assert f"damaged checkpoint {checkpoint}" in capsys.readouterr().err
    assert json.loads((run / "summary.json").read_text())["steps"] == 26


@pytest.mark.parametrize(("moment", "rank"), [("part", 1), ("part", 0), ("rename", 0)])
def test_a_kill_within_a_save_of_all_ranks_leaves_the_checkpoint_before_it(
    sessions: Sessions, moment: str, rank: int
) -> None:
    """The third save is that of step 12, the end of the first stage."""
    killer = (
        f"    - class_path: tests.probes.KillInSave\n      init_args: {{moment: {moment}, rank: {rank}, save: 3}}\n"
    )
    whole = sessions._config
    run_in_ranks((1, sessions.command("full", "full", 8)))
    sessions._config = whole + killer
    first = sessions.command("first", "moved", 2, *sharded(2, 1), "--trainer.devices", "2")
    command = [sys.executable, "-m", "lightning_danube", *first]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(command, cwd=sessions.tiny, env=environment, capture_output=True, text=True, timeout=240)
    assert killed.returncode != 0 and "was ended" in killed.stderr, killed.stdout + killed.stderr
    directory = (sessions.run("moved") / LAST).parent
    # Rank zero may find that another rank is gone, and remove what it has begun, before it is ended itself.
    assert len(list(directory.glob(".*.partial"))) <= 1 and (rank or list(directory.glob(".*.partial")))
    left = sorted(path.name for path in directory.glob("*.ckpt"))
    assert left == ["step_00000005.ckpt", "step_00000010.ckpt"]
    assert [damage(directory / name) for name in left] == [None, None]
    sessions._config = whole
    run_in_ranks((2, sessions.command("second", "moved", 2, *LAST_FLAGS, *sharded(2, 1))))
    assert_same_run(sessions, "moved", ("first", 0), ("second", 10), devices=(2, 2))
    assert not list(directory.glob(".*.partial"))


def holding(sessions: Sessions, arguments: str) -> list[str]:
    """A session that ends at step 8; what step 5 saves is held back until step 7 is done."""
    whole = sessions._config
    sessions._config += f"    - class_path: tests.probes.HoldSave\n      init_args: {{until: 7{arguments}}}\n"
    command = sessions.command("first", "moved", 2, *sharded(2, 1), "--trainer.max_steps", "8")
    sessions._config = whole
    return command


def test_training_goes_on_while_a_checkpoint_is_written_and_the_checkpoint_is_of_its_step(sessions: Sessions) -> None:
    run_in_ranks(
        (1, sessions.command("full", "full", 8)),
        (2, holding(sessions, "")),
    )
    # As if it had been killed after step 8.
    remove_checkpoint(sessions.run("moved") / "checkpoints" / "step_00000008.ckpt")
    run_in_ranks((2, sessions.command("second", "moved", 2, *LAST_FLAGS, *sharded(2, 1))))
    assert_same_run(sessions, "moved", ("first", 0), ("second", 5), devices=(2, 2))


def test_a_checkpoint_that_can_not_be_written_ends_the_run_with_one_line(sessions: Sessions) -> None:
    command = [sys.executable, "-m", "lightning_danube", *holding(sessions, ", fail: disk"), "--trainer.devices", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    failed = subprocess.run(command, cwd=sessions.tiny, env=environment, capture_output=True, text=True, timeout=240)
    checkpoint = sessions.run("moved") / "checkpoints" / "step_00000005.ckpt"
    assert failed.returncode == 2
    assert failed.stderr.strip().splitlines()[-1] == (
        f"error: {checkpoint}: checkpoint not written (rank 1): no space left on device; free some space, then begin "
        "again: none was written yet"
    )
    assert "Traceback" not in failed.stderr
    assert not list(checkpoint.parent.glob("*.ckpt"))
