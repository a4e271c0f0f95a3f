"""The private parts of Lightning and PyTorch that the sharded strategy uses. Runs: test_sharded_runs.py."""

from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any, get_args

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_danube.checkpoints.strategy import ShardedStrategy


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
