"""Trainers made in Python. Whole runs: tests/test_public_api.py."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_danube import device
from lightning_danube.__main__ import main
from lightning_danube.checkpoints.single import DurableCheckpointIO
from lightning_danube.checkpoints.strategy import ShardedStrategy
from lightning_danube.training.trainer import (
    FastProducts,
    check_trainer,
    device_count,
    make_trainer,
    own_strategy,
    share_buckets,
)
from tests.ranks import on_ranks


def test_a_made_trainer_has_the_settings_of_fit(tmp_path: Path) -> None:
    trainer = make_trainer("own", runs=tmp_path, accelerator="cpu", devices=1, precision="32-true")
    assert trainer.gradient_clip_val == 1.0 and trainer.max_epochs == 1 and trainer.num_sanity_val_steps == 0
    assert isinstance(trainer.strategy.checkpoint_io, DurableCheckpointIO)
    assert not trainer._accelerator_connector.use_distributed_sampler
    assert trainer.default_root_dir == str(tmp_path / "own" / "version_0")
    check_trainer(trainer)
    other = make_trainer(runs=tmp_path, accelerator="cpu", devices=1, precision="64-true", gradient_clip_val=0.5)
    assert (other.gradient_clip_val, other.precision) == (0.5, "64-true")


@pytest.mark.parametrize(("world_size", "deals", "refused"), [(2, True, True), (2, False, False), (1, True, False)])
def test_a_trainer_that_deals_the_samples_again_is_refused(world_size: int, deals: bool, refused: bool) -> None:
    connector = SimpleNamespace(use_distributed_sampler=deals)
    trainer: Any = SimpleNamespace(
        gradient_clip_val=1.0,
        strategy=None,
        checkpoint_callbacks=[],
        world_size=world_size,
        _accelerator_connector=connector,
    )
    if refused:
        with pytest.raises(ValueError, match="the trainer would deal the samples a second time: make the trainer with"):
            check_trainer(trainer)
    else:
        check_trainer(trainer)


def test_lightnings_sharded_strategy_is_replaced_or_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 2, "precision": "32-true"}
    made = make_trainer(runs=tmp_path, strategy=ModelParallelStrategy(tensor_parallel_size=2), **options)
    assert type(made.strategy) is ShardedStrategy and made.strategy._tensor_parallel_size == 2
    theirs = Trainer(strategy=ModelParallelStrategy(), logger=False, gradient_clip_val=1.0, **options)
    with pytest.raises(ValueError, match=r"ModelParallelStrategy shards no weights here: make the trainer with"):
        check_trainer(theirs)


def test_on_one_device_nothing_is_sharded(tmp_path: Path) -> None:
    strategy = ShardedStrategy(tensor_parallel_size=1, shard_size="node")
    made = make_trainer(runs=tmp_path, strategy=strategy, accelerator="cpu", precision="32-true")
    assert isinstance(made.strategy, SingleDeviceStrategy)
    assert own_strategy(strategy, "cpu", 2) is strategy and own_strategy(strategy, "cpu", 1, nodes=2) is strategy
    assert own_strategy("ddp", "cpu", 1) == "ddp"


@pytest.mark.medium
def test_a_configuration_for_a_cluster_trains_on_one_device(tiny: Path) -> None:
    """The strategy of the paper's configurations. The checkpoint is the file of a run without a strategy."""
    strategy = ("--trainer.strategy", "lightning_danube.checkpoints.strategy.ShardedStrategy")
    sizes = ("--trainer.strategy.tensor_parallel_size", "1", "--trainer.strategy.shard_size", "node")
    assert main(["fit", "--config", str(tiny / "tiny.yaml"), *strategy, *sizes]) == 0
    checkpoints = list((tiny / "runs").rglob("*.ckpt"))
    assert checkpoints and all(path.is_file() for path in checkpoints)


@pytest.mark.parametrize(
    ("devices", "count"),
    [("auto", 1), (-1, 1), ("-1", 1), (3, 3), ("3", 3), ([0, 2], 2), ("0,2", 2), ("0,", 1), ("many", 0)],
)
def test_devices_are_counted_as_the_trainer_counts_them(devices: Any, count: int) -> None:
    assert device_count("cpu", devices) == count


def test_gradients_lie_in_the_buckets_of_ddp(tmp_path: Path) -> None:
    options: dict[str, Any] = {"accelerator": "cpu", "devices": 2, "precision": "32-true"}
    made = make_trainer(runs=tmp_path, strategy="ddp", **options)
    assert isinstance(made.strategy, DDPStrategy)
    assert made.strategy._ddp_kwargs == {"gradient_as_bucket_view": True}
    strategy = DDPStrategy(gradient_as_bucket_view=False)
    share_buckets(strategy)
    assert strategy._ddp_kwargs == {"gradient_as_bucket_view": False}, "what the user has set stays"


def test_gradients_in_buckets_train_the_same() -> None:
    """Three steps of two micro-batches each, of which the first sends nothing, as the trainer runs them."""

    def weights(rank: int, **options: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = DistributedDataParallel(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).double(), **options)
        optimizer = torch.optim.AdamW(module.parameters(), fused=True)
        rows = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64)
        for first, last in rows[:, :, rank].unbind(0):
            with module.no_sync():
                module(first).square().mean().backward()
            module(last).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach() for parameter in module.parameters()]

    def work(rank: int) -> None:
        pairs = zip(weights(rank), weights(rank, gradient_as_bucket_view=True), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)

    on_ranks(work)


def test_products_are_taken_back_after_a_run_and_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "onednn_stays_exact", lambda: True)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    task: Any = None
    for end in ("teardown", "on_exception"):
        products = FastProducts()
        products.setup(trainer, task, "fit")
        assert torch.get_float32_matmul_precision() == "medium"
        getattr(products, end)(trainer, task, "fit" if end == "teardown" else ValueError())
        try:
            assert torch.get_float32_matmul_precision() == "highest"
        finally:
            torch.set_float32_matmul_precision("highest")
