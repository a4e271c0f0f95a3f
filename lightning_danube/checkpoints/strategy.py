"""Lightning's ModelParallelStrategy with checkpoints that are complete or absent, and that any sharding can read.

It also has FSDP2's hybrid layout, and sums gradients over the replicas once in an optimizer step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from lightning_danube.checkpoints import parallel_sizes, replicas_of_a_node
from lightning_danube.checkpoints import sharded as sharded_checkpoints
from lightning_danube.checkpoints.content import check_content, check_plain
from lightning_danube.checkpoints.files import read_plain
from lightning_danube.checkpoints.sharded import Saver, numbered
from lightning_danube.checkpoints.sharded_files import MOMENT, WEIGHT, load_into, tensor_shapes
from lightning_danube.checkpoints.single import DurableCheckpointIO
from lightning_danube.model.parallel import gradients_kept_apart


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over the data-parallel replicas, tensor parallelism inside each of them.

    Replaces ModelParallelStrategy when a configuration names that class.

    With `save_distributed_checkpoint` (the default), each rank writes its part while training continues. Without it,
    all ranks wait while rank zero gathers the tensors in host memory, one after the other, and writes the same file as
    an unsharded run. Lightning's class numbers an optimizer's state in module order. The optimizers here group their
    parameters, so Lightning's numbers would assign moments to the wrong weights.

    Args:
        data_parallel_size: number of replicas; "auto": one for each node if tensor_parallel_size is "auto", too, else
            as many as there are devices for.
        tensor_parallel_size: number of devices of a replica; "auto": all devices of a node.
        shard_size: number of replicas that share one copy of weights, gradients and optimizer state; "node": those of a
            node; "auto": all. With fewer, each group of so many replicas has a copy (HSDP), and gathers inside the
            group only.
        gather_again: free the weights of a block after its forward pass, and gather them again for the backward pass.
            False: less communication, and the weights of all blocks in memory.
        reduce_once: with several micro-batches in an optimizer step, sum the gradients over the replicas after the last
            of them only. Each device then holds the gradients of all weights. False: sum after each micro-batch, and
            hold a share.
        save_distributed_checkpoint: whether a checkpoint is a directory that all ranks write.
        process_group_backend: back end of torch.distributed.
        timeout: how long a rank waits for another rank.
    """

    def __init__(
        self,
        data_parallel_size: Literal["auto"] | int = "auto",
        tensor_parallel_size: Literal["auto"] | int = "auto",
        *,
        shard_size: Literal["auto", "node"] | int = "auto",
        gather_again: bool = True,
        reduce_once: bool = True,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            data_parallel_size, tensor_parallel_size, save_distributed_checkpoint, process_group_backend, timeout
        )
        self.shard_size, self.gather_again, self.reduce_once = shard_size, gather_again, reduce_once
        self._meshes: tuple[DeviceMesh, DeviceMesh] | None = None
        self._saver = Saver(self._timeout)
        self._interrupted = False

    @classmethod
    def like(cls, strategy: ModelParallelStrategy) -> ShardedStrategy:
        return cls(
            strategy._data_parallel_size,
            strategy._tensor_parallel_size,
            save_distributed_checkpoint=strategy._save_distributed_checkpoint,
            process_group_backend=strategy._process_group_backend,
            timeout=strategy._timeout,
        )

    @property
    def meshes(self) -> tuple[DeviceMesh, DeviceMesh]:
        """The replicas, with two dimensions in a hybrid layout, and the devices of this replica."""
        assert self._meshes is not None, "the processes have no group yet"
        return self._meshes

    def setup_environment(self) -> None:
        sizes = self._data_parallel_size, self._tensor_parallel_size
        nodes, of_a_node = self.num_nodes, self.num_processes
        self._data_parallel_size, self._tensor_parallel_size = parallel_sizes(*sizes, nodes=nodes, devices=of_a_node)
        super().setup_environment()
        mesh = self.device_mesh
        self._meshes = mesh["data_parallel"], mesh["tensor_parallel"]
        replicas, devices = (one.size() for one in self._meshes)
        shared = replicas if self.shard_size == "auto" else self.shard_size
        if shared == "node":
            shared = replicas_of_a_node(replicas, devices, of_a_node)
        if not 1 <= shared <= replicas or replicas % shared:
            fits = ", ".join(str(n) for n in range(1, replicas + 1) if replicas % n == 0)
            raise ValueError(
                f"trainer.strategy.shard_size {shared} does not divide data_parallel_size {replicas}: {fits} would work"
            )
        if shared < replicas:
            # FSDP2 and tensor parallelism need dimensions of one mesh.
            names = ("groups", "shards", "tensor_parallel")
            grid = init_device_mesh(self.root_device.type, (replicas // shared, shared, devices), mesh_dim_names=names)
            self._meshes = grid["groups", "shards"], grid["tensor_parallel"]
        if self._save_distributed_checkpoint:
            self._saver.open()

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning runs every micro-batch of an optimizer step but the last inside this context."""
        assert self.lightning_module is not None
        with gradients_kept_apart(self.lightning_module, in_full=self.reduce_once):
            yield

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        weights = self.lightning_module.state_dict()
        return weights if self._save_distributed_checkpoint else self._whole(weights)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        names = self._names()
        groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
        state = {names[id(parameter)]: values for parameter, values in optimizer.state.items()}
        if self._save_distributed_checkpoint:
            return {"state": state, "param_groups": groups}
        return numbered({name: self._whole(values) for name, values in state.items()}, groups)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any | None = None) -> None:
        assert storage_options is None, "a local file has no storage options"
        path = Path(self.broadcast(filepath))
        if not self._save_distributed_checkpoint:
            if self.is_global_zero:
                io = self.checkpoint_io
                # The tensors are copies already, in the host's memory.
                save = io.save_own if isinstance(io, DurableCheckpointIO) else io.save_checkpoint
                save(checkpoint, path)
            return
        tensors = {WEIGHT + name: tensor for name, tensor in checkpoint.pop("state_dict").items()}
        groups = []
        for number, state in enumerate(checkpoint.pop("optimizer_states", [])):
            groups.append(state["param_groups"])
            for name, values in state["state"].items():
                tensors |= {f"{MOMENT}{number}/{key}/{name}": tensor for key, tensor in values.items()}
        self._saver.save(tensors, {**checkpoint, "optimizer_groups": groups}, path)

    def wait_for_checkpoint(self) -> None:
        """Returns when the checkpoint that `save_checkpoint` started is on disk.

        Raises:
            OSError: it could not be written.
        """
        self._saver.wait()
        if isinstance(self.checkpoint_io, DurableCheckpointIO):
            self.checkpoint_io.wait()

    def on_exception(self, exception: BaseException) -> None:
        self._interrupted = True  # other ranks may have ended, so do not wait for the checkpoint
        super().on_exception(exception)

    def teardown(self) -> None:
        if not self._interrupted:
            self.wait_for_checkpoint()
        super().teardown()

    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads model and optimizers from a sharded or a single-file checkpoint. Returns the other content.

        A single-file checkpoint is returned with its tensors.
        """
        path = Path(self.broadcast(checkpoint_path))
        assert self.lightning_module is not None
        weights = self.lightning_module.state_dict()
        if path.is_dir():
            return self._load_together(path, weights)
        # The file is memory-mapped: each rank reads only the parts that it keeps.
        checkpoint = read_plain(path, mmap=True)
        check_content(checkpoint, path)
        self.lightning_module.on_load_checkpoint(checkpoint)
        for name, tensor in weights.items():
            take_part(tensor, checkpoint["state_dict"][name])
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for number, values in saved["state"].items():
                parameter = parameters[number]
                optimizer.state[parameter] = {key: like(parameter, value.shape, value) for key, value in values.items()}
                for key, value in values.items():
                    take_part(optimizer.state[parameter][key], value)
            restore_groups(optimizer, saved["param_groups"])
        return checkpoint

    def _load_together(self, path: Path, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        rest = sharded_checkpoints.read_rest(path)
        assert self.lightning_module is not None
        self.lightning_module.on_load_checkpoint(rest)
        tensors = {WEIGHT + name: tensor for name, tensor in weights.items()}
        saved = tensor_shapes(path)
        for number, optimizer in enumerate(self.optimizers):
            parameter_of = {self._names()[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
            prefix = f"{MOMENT}{number}/"
            for name in (name for name in saved if name.startswith(prefix)):
                key, of = name.removeprefix(prefix).split("/", 1)
                size, dtype = saved[name]
                value = like(parameter_of[of], size, torch.empty((), dtype=dtype))
                optimizer.state[parameter_of[of]][key] = tensors[name] = value
        load_into(tensors, path)
        check_plain(tensors, path, "tensor", floats=False)
        for optimizer, groups in zip(self.optimizers, rest["optimizer_groups"], strict=False):
            restore_groups(optimizer, groups)
        return rest

    def _names(self) -> dict[int, str]:
        assert self.lightning_module is not None
        for module in self.lightning_module.modules():
            if isinstance(module, FSDPModule):  # after validation, gathered weights may replace the shards
                module.reshard()
        return {id(parameter): name for name, parameter in self.lightning_module.named_parameters()}

    def _whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the unsharded tensors on rank zero's host, and nothing on other ranks. All ranks must call it."""
        whole = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            if self.is_global_zero:
                whole[name] = full.detach().to("cpu", copy=True)
        return whole


def like(parameter: Tensor, size: torch.Size, value: Tensor) -> Tensor:
    """Returns a tensor to load an optimizer's state value into, sharded like its parameter if the shapes are equal."""
    if parameter.shape == size:
        return torch.zeros_like(parameter, dtype=value.dtype, requires_grad=False)
    return torch.empty(size, dtype=value.dtype)


@torch.no_grad()
def take_part(target: Tensor, whole: Tensor) -> None:
    """Fills a tensor with its part of the unsharded tensor `whole`. The target may be distributed or not."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if target.shape != whole.shape:
        raise ValueError(f"the checkpoint has a tensor of {tuple(whole.shape)} where {tuple(target.shape)} is needed")
    if not isinstance(target, DTensor):
        target.copy_(whole)
        return
    shape, offset = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    place = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
    target.to_local().copy_(whole[place])


def restore_groups(optimizer: Optimizer, saved: list[dict[str, Any]]) -> None:
    for group, old in zip(optimizer.param_groups, saved, strict=True):
        group.update({key: value for key, value in old.items() if key != "params"})


def wait_for_checkpoint(strategy: Strategy) -> None:
    """Returns when the last checkpoint is on disk, if it is written while training continues.

    Raises:
        OSError: it could not be written.
    """
    if isinstance(strategy, ShardedStrategy):
        strategy.wait_for_checkpoint()
    elif isinstance(strategy.checkpoint_io, DurableCheckpointIO):
        strategy.checkpoint_io.wait()


def raise_failed_checkpoint(strategy: Strategy) -> None:
    """Raises the error of a checkpoint of one file that could not be written. Waits for nothing."""
    if isinstance(strategy.checkpoint_io, DurableCheckpointIO):
        strategy.checkpoint_io.raise_failure()


def checkpoint_in_progress(strategy: Strategy) -> Path | None:
    """Returns the checkpoint of one file that is being written, on the rank that writes."""
    io = strategy.checkpoint_io
    return io.writing if isinstance(io, DurableCheckpointIO) else None
