"""The private parts of Lightning and PyTorch that the sharded strategy uses. Runs: test_sharded_runs.py."""

from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_danube.checkpoints.strategy import ShardedStrategy, restore_groups, take_part


def test_our_strategy_is_made_with_every_argument_of_lightnings() -> None:
    arguments: dict[str, Any] = {
        "data_parallel_size": 3,
        "tensor_parallel_size": 5,
        "save_distributed_checkpoint": False,
        "process_group_backend": "gloo",
        "timeout": timedelta(seconds=7),
    }
    assert arguments.keys() == signature(ModelParallelStrategy).parameters.keys(), "ShardedStrategy.like hands these on"
    ours = ShardedStrategy.like(ModelParallelStrategy(**arguments))
    assert {name: getattr(ours, f"_{name}") for name in arguments} == arguments


def test_lightnings_optimizer_still_has_the_private_one_inside() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
    assert LightningOptimizer(optimizer)._optimizer is optimizer


def test_lightning_still_names_its_type_of_paths() -> None:
    assert set(get_args(_PATH)) == {str, Path}


def test_pytorch_still_computes_the_place_of_a_shard() -> None:
    first_three = list(signature(compute_local_shape_and_global_offset).parameters)[:3]
    assert first_three == ["global_shape", "mesh", "placements"]


# --- the parts that need no second process ----------------------------------------------------------------------------


def test_a_tensor_of_another_shape_is_refused() -> None:
    target = torch.zeros(3, 2)
    take_part(target, torch.ones(3, 2))
    assert target.eq(1).all()
    with pytest.raises(ValueError, match=r"a tensor of \(3, 1\) where \(3, 2\) is needed"):
        take_part(target, torch.zeros(3, 1))
    assert target.eq(1).all()


def test_groups_keep_their_parameters() -> None:
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [parameter]} for parameter in parameters], lr=0.1)
    restore_groups(optimizer, [{"lr": 0.5, "params": ["a"]}, {"lr": 0.25, "params": ["b"]}])
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    assert all(group["params"][0] is one for group, one in zip(optimizer.param_groups, parameters, strict=True))


def test_a_run_waits_for_its_checkpoint_unless_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    for name in ("teardown", "on_exception"):
        monkeypatch.setattr(ModelParallelStrategy, name, lambda self, *error: None)
    monkeypatch.setattr(ShardedStrategy, "wait_for_checkpoint", lambda self: waited.append("yes"))
    strategy = ShardedStrategy.like(ModelParallelStrategy())
    strategy.teardown()
    assert waited == ["yes"]
    strategy.on_exception(ValueError())
    strategy.teardown()
    assert waited == ["yes"]
