"""The private parts of Lightning and PyTorch that the sharded strategy uses. Runs: test_sharded_runs.py."""

from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from lightning_danube.checkpoints import parallel_sizes, replicas_of_a_node
from lightning_danube.checkpoints import strategy as strategy_module
from lightning_danube.checkpoints.sharded import Saver
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
    assert arguments.keys() < signature(ShardedStrategy).parameters.keys()


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


class Mesh(NamedTuple):
    """A dimension of a mesh."""

    devices: int

    def size(self) -> int:
        return self.devices


@pytest.fixture
def four_by_two(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Lightning's environment has 4 replicas of 2 devices; the arguments of a mesh that we make are recorded."""
    made: list[Any] = []

    def make(kind: str, shape: tuple[int, ...], *, mesh_dim_names: tuple[str, ...]) -> Any:
        made.append((kind, shape, mesh_dim_names))
        return {("groups", "shards"): "grid", "tensor_parallel": "devices"}

    monkeypatch.setattr(ModelParallelStrategy, "setup_environment", lambda self: None)
    mesh = {"data_parallel": Mesh(4), "tensor_parallel": Mesh(2)}
    monkeypatch.setattr(ModelParallelStrategy, "device_mesh", property(lambda self: mesh))
    monkeypatch.setattr(ModelParallelStrategy, "root_device", property(lambda self: torch.device("cpu")))
    monkeypatch.setattr(strategy_module, "init_device_mesh", make)
    monkeypatch.setattr(Saver, "open", lambda self: None)  # there is no process group
    return made


@pytest.mark.parametrize("shared", ["auto", 4])
def test_all_replicas_share_one_copy_unless_told_otherwise(four_by_two: list[Any], shared: Any) -> None:
    strategy = ShardedStrategy(shard_size=shared)
    strategy.setup_environment()
    meshes: Any = strategy.meshes
    assert meshes == (Mesh(4), Mesh(2)) and four_by_two == []


def test_groups_of_replicas_and_their_devices_are_one_mesh(four_by_two: list[Any]) -> None:
    strategy = ShardedStrategy(shard_size=2)
    strategy.setup_environment()
    meshes: Any = strategy.meshes
    assert meshes == ("grid", "devices")
    assert four_by_two == [("cpu", (2, 2, 2), ("groups", "shards", "tensor_parallel"))]


def test_the_replicas_of_a_node_share_a_copy(four_by_two: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardedStrategy, "num_processes", property(lambda self: 4))
    strategy = ShardedStrategy(tensor_parallel_size=2, shard_size="node")
    strategy.num_nodes = 2
    strategy.setup_environment()
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == (4, 2)
    assert four_by_two == [("cpu", (2, 2, 2), ("groups", "shards", "tensor_parallel"))]


@pytest.mark.parametrize(
    ("data", "tensor", "expected"),
    [("auto", "auto", (4, 8)), ("auto", 1, (32, 1)), ("auto", 4, (8, 4)), (16, 2, (16, 2)), (4, "auto", (4, 8))],
)
def test_the_number_of_replicas_follows_from_the_devices(data: Any, tensor: Any, expected: tuple[int, int]) -> None:
    assert parallel_sizes(data, tensor, nodes=4, devices=8) == expected
    replicas, devices = expected
    assert replicas_of_a_node(replicas, devices, 8) == min(replicas, 8 // devices)


@pytest.mark.parametrize("shared", [0, 3, 8, -2])
def test_groups_that_do_not_divide_the_replicas_are_refused(four_by_two: list[Any], shared: int) -> None:
    message = f"shard_size {shared} does not divide data_parallel_size 4: 1, 2, 4 would work"
    with pytest.raises(ValueError, match=message):
        ShardedStrategy(shard_size=shared).setup_environment()


@pytest.mark.parametrize("distributed", [True, False])
def test_the_group_of_the_checkpoints_is_made_at_the_start(
    four_by_two: list[Any], monkeypatch: pytest.MonkeyPatch, distributed: bool
) -> None:
    """Nodes that cannot reach each other by gloo fail before the first step, and not at the first save."""
    opened: list[Any] = []
    monkeypatch.setattr(Saver, "open", lambda self: opened.append(self))
    ShardedStrategy(save_distributed_checkpoint=distributed).setup_environment()
    assert len(opened) == int(distributed)


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
