"""Computes what a pre-training run will cost: its layout, what fits, how long it takes, when to save."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from lightning_danube.checkpoints import SaveInterval
from lightning_danube.planning.accelerators import Accelerator
from lightning_danube.planning.memory import Layout, TrainingMemory
from lightning_danube.pretraining.settings import CurriculumSettings

USABLE = 0.9
"""Share of a device's memory for tensors. The rest is for its context, its libraries and fragmentation."""

HOURS_BETWEEN_FAILURES = 50_000.0
"""Mean time between failures of one device: training Llama 3 on 16,384 devices had 419 unexpected interruptions in 54
days (arXiv 2407.21783, section 3)."""

MOST_DEVICES = 4096


@dataclasses.dataclass(frozen=True)
class TrainerSection:
    """The options of Lightning's trainer that a plan depends on, with the trainer's defaults. Classes are not
    instantiated: a mapping names them by `class_path` and `init_args`."""

    accelerator: str | dict[str, Any] = "auto"
    strategy: str | dict[str, Any] = "auto"
    devices: list[int] | int | str = "auto"
    num_nodes: int = 1
    precision: int | str | None = None
    callbacks: list[str | dict[str, Any]] | dict[str, Any] | str | None = None

    @property
    def save_interval(self) -> SaveInterval | None:
        """Returns the interval between two checkpoints, None if no callback saves checkpoints."""
        callbacks = self.callbacks if isinstance(self.callbacks, list) else [self.callbacks or {}]
        for callback in callbacks:
            if _class_name(callback) == "Checkpoints":
                given = _arguments(callback)
                every = given.get("every_n_steps")
                return SaveInterval(None if every is None else int(every), given.get("save_every"))
        return None


def _class_name(one: str | Mapping[str, Any]) -> str:
    named = one.get("class_path", "") if isinstance(one, Mapping) else one
    return str(named).rpartition(".")[2]


def _arguments(one: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the options of a class. On a command line they may stand beside `class_path`."""
    return {**(one.get("init_args") or {}), **one} if isinstance(one, Mapping) else {}


def layout_of(trainer: TrainerSection) -> tuple[Layout, list[str]]:
    """Returns how a trainer section spreads a run over devices, and the assumptions made, in words.

    Raises:
        ValueError: the memory of the strategy is not known, or sizes do not fit together.
    """
    notes = []
    nodes, devices = trainer.num_nodes, _devices(trainer.devices)
    if devices is None:
        notes.append("trainer.devices is auto: counted as 1; say how many with --trainer.devices N")
        devices = 1
    name, world = _class_name(trainer.strategy), nodes * devices
    if name in ("ModelParallelStrategy", "ShardedStrategy"):
        # The strategy's set-up resolves "auto" from the number of devices.
        sizes = _arguments(trainer.strategy)
        data, tensor = (sizes.get(f"{kind}_parallel_size", "auto") for kind in ("data", "tensor"))
        data, tensor = nodes if data == "auto" else int(data), devices if tensor == "auto" else int(tensor)
        if data * tensor != world:
            raise ValueError(
                f"trainer.strategy: data_parallel_size {data} × tensor_parallel_size {tensor} is not {world}, the "
                f"devices of {nodes} node(s) × {devices}"
            )
        shared = sizes.get("shard_size", "auto")
        if shared != "auto" and (int(shared) < 1 or data % int(shared)):
            raise ValueError(f"trainer.strategy.shard_size {shared} does not divide data_parallel_size {data}")
        return Layout(
            data,
            tensor,
            sharded=True,
            shard_size=None if shared == "auto" else int(shared),
            gather_again=_is_on(sizes.get("gather_again", True)),
            reduce_once=_is_on(sizes.get("reduce_once", True)),
        ), notes
    if name in ("FSDPStrategy", "fsdp"):
        return Layout(world, sharded=True), notes
    if name in ("DDPStrategy", "SingleDeviceStrategy", "auto") or name.startswith("ddp"):
        return Layout(world), notes
    raise ValueError(f"trainer.strategy is {name}: its memory is not known here; plan knows ddp and ShardedStrategy")


def _is_on(option: Any) -> bool:
    """Returns the value of an option that a file states as a bool and a command line as a word."""
    return str(option).lower() == "true"


def _devices(devices: Any) -> int | None:
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if text == "auto" or text == "-1":
        return None
    return len(text.split(",")) if "," in text else int(text)


def fewest_devices(memory: TrainingMemory, data: CurriculumSettings, capacity: float, *, sharded: bool) -> int | None:
    """Returns the smallest number of devices on which the run fits, each with `capacity` bytes for tensors.

    Returns None if the run fits on no number up to MOST_DEVICES. Tensor parallelism does not change, and the number of
    replicas must divide an optimizer step.
    """
    tensor = memory.layout.tensor_parallel
    for replicas in range(1, MOST_DEVICES // tensor + 1):
        if data.batch_samples % (replicas * memory.rows):
            continue
        accumulate = data.batch_samples > replicas * memory.rows
        layout = dataclasses.replace(memory.layout, replicas=replicas, sharded=sharded, shard_size=None)
        if dataclasses.replace(memory, layout=layout, accumulate=accumulate).peak().total <= capacity:
            return replicas * tensor
        if not sharded and replicas > 1 and not accumulate:
            return None  # every further replica holds as much
    return None


def seconds_of(flops: float, devices: int, accelerator: Accelerator, utilisation: float) -> float:
    """Returns the seconds for a number of model FLOPs. Utilisation does not count recomputed blocks as work."""
    return flops / (devices * accelerator.flops * utilisation)


@dataclasses.dataclass(frozen=True)
class CheckpointAdvice:
    """How often to save, by Young's first-order approximation (1974): every sqrt(2 × write × mean time between
    failures).

    Args:
        size: bytes of one checkpoint.
        write: seconds to write one checkpoint.
        between_failures: mean seconds between two failures of the whole job.
    """

    size: int
    write: float
    between_failures: float

    @property
    def interval(self) -> float:
        """Returns the seconds between two checkpoints at which the least time is lost."""
        return math.sqrt(2 * self.write * self.between_failures)

    def lost(self, interval: float) -> float:
        """Returns the share of the time spent on saving and on repeating the steps that a failure lost."""
        return self.write / interval + interval / (2 * self.between_failures)


def checkpoint_bytes(memory: TrainingMemory) -> int:
    """Returns bytes of the weights that train and of the optimizer's averages, all in the weights' type.

    The rest is a few KB.
    """
    alone = dataclasses.replace(memory, layout=Layout())
    return (alone.trained_parameters + alone.optimizer_values) * memory.weight_bytes
