"""Computes what a pre-training run will cost: its layout, what fits, how long it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lightning_danube.checkpoints import SaveInterval, parallel_sizes, replicas_of_a_node
from lightning_danube.planning.accelerators import Accelerator
from lightning_danube.planning.memory import BYTES, Layout, TrainingMemory
from lightning_danube.planning.network import Network
from lightning_danube.planning.step_time import MEAN_DOCUMENT, StepTime, step_time
from lightning_danube.pretraining.curriculum import stage_samples
from lightning_danube.pretraining.settings import CurriculumSettings
from lightning_danube.pretraining.supply import Supply
from lightning_danube.terminal import amount

USABLE = 0.9
"""Share of a device's memory for tensors. The rest is for its context, its libraries and fragmentation."""

MOST_DEVICES = 4096

SHARDED = ("ModelParallelStrategy", "ShardedStrategy")


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
    def devices_of_a_node(self) -> int:
        """Returns the devices of a node, 1 if they are not stated."""
        return _devices(self.devices) or 1

    @property
    def saves_in_background(self) -> bool:
        """Returns whether training goes on while a checkpoint is written."""
        several = self.num_nodes * self.devices_of_a_node > 1
        return self.accelerator != "cpu" or (several and _class_name(self.strategy) in SHARDED)

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
    """Returns the options of a class. On a command line they may be beside `class_path`."""
    return {**(one.get("init_args") or {}), **one} if isinstance(one, Mapping) else {}


def layout_of(trainer: TrainerSection) -> tuple[Layout, list[str]]:
    """Returns how a trainer section spreads a run over devices, and the assumptions made, in words.

    Raises:
        ValueError: the memory of the strategy is not known, or sizes do not fit together.
    """
    notes = []
    nodes, devices = trainer.num_nodes, trainer.devices_of_a_node
    if _devices(trainer.devices) is None:
        notes.append("trainer.devices is auto: counted as 1; say how many with --trainer.devices N")
    name, world = _class_name(trainer.strategy), nodes * devices
    if name in SHARDED:
        sizes = _arguments(trainer.strategy)
        data, tensor = parallel_sizes(
            *(sizes.get(f"{kind}_parallel_size", "auto") for kind in ("data", "tensor")), nodes=nodes, devices=devices
        )
        if data * tensor != world:
            raise ValueError(
                f"trainer.strategy: data_parallel_size {data} × tensor_parallel_size {tensor} is not {world}, the "
                f"devices of {amount(nodes, 'node')} × {amount(devices, 'device')}"
            )
        shared = sizes.get("shard_size", "auto")
        if shared == "node":
            shared = replicas_of_a_node(data, tensor, devices)
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


def fewest_devices(
    memory: TrainingMemory, data: CurriculumSettings, capacity: float, *, sharded: bool, least: int = 1
) -> int | None:
    """Returns the smallest number of devices on which the run fits, each with `capacity` bytes for tensors.

    Returns None if the run fits on no number up to MOST_DEVICES. Tensor parallelism does not change, and the number of
    replicas must divide an optimizer step. The groups of a hybrid layout keep their size, unless there are fewer
    replicas.

    Args:
        least: replicas to begin with.
    """
    tensor, group = memory.layout.tensor_parallel, memory.layout.shard_size if memory.layout.sharded else None
    for replicas in range(least, MOST_DEVICES // tensor + 1):
        if data.batch_samples % (replicas * memory.rows):
            continue
        together = group if sharded and group is not None and replicas > group else None
        if together is not None and replicas % together:
            continue
        accumulate = data.batch_samples > replicas * memory.rows
        layout = dataclasses.replace(memory.layout, replicas=replicas, sharded=sharded, shard_size=together)
        if dataclasses.replace(memory, layout=layout, accumulate=accumulate).peak().total <= capacity:
            return replicas * tensor
        if not sharded and replicas > 1 and not accumulate:
            return None  # every further replica holds as much
    return None


def fitting_devices(memory: TrainingMemory, data: CurriculumSettings, capacity: float, *, sharded: bool) -> str:
    """Returns in words on how many devices the run fits at least.

    One device may hold what two do not: it needs no buffers for communication, and DDP keeps all gradients.
    """
    fewest = fewest_devices(memory, data, capacity, sharded=sharded)
    alone = memory.layout.tensor_parallel
    if fewest is None:
        return "none"
    if fewest > alone or data.batch_samples == memory.rows:
        return f"{fewest:,}"
    several = fewest_devices(memory, data, capacity, sharded=sharded, least=2)
    if several is None:
        return f"only {alone:,}"
    fits_next = several == alone * next(
        n for n in range(2, MOST_DEVICES) if data.batch_samples % (n * memory.rows) == 0
    )
    return f"{alone:,}" if fits_next else f"{alone:,} or {several:,}"


# --- time -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Pace:
    """How fast a run is on one kind of device.

    Args:
        seconds: seconds of an optimizer step.
        parts: what they are spent on; None if the time is a stated or assumed share of the peak.
    """

    seconds: float
    parts: StepTime | None = None


def mean_document(data: CurriculumSettings, supply: Mapping[str, Supply]) -> float:
    """Returns the mean tokens of a document in the mixture of a run, as far as prepared shards say it."""
    taken: dict[str, float] = dict.fromkeys(data.sources, 0.0)
    for stage in data.stages:
        whole = sum(stage.mix.values())
        for name, share in stage.mix.items():
            taken[name] += share / whole * stage_samples(stage, data.context_length, data.batch_samples)
    # A token's document is of its source's mean length: the mixture takes so many documents of each source.
    documents = sum(tokens / (supply[name].document_tokens or MEAN_DOCUMENT) for name, tokens in taken.items())
    return sum(taken.values()) / documents


def pace_of(
    memory: TrainingMemory,
    data: CurriculumSettings,
    accelerator: Accelerator,
    network: Network,
    *,
    utilisation: float | None = None,
    document: float | None = None,
) -> Pace:
    """Returns the time of an optimizer step.

    Args:
        network: the links between devices; that of the accelerator takes the place of `link`.
        utilisation: share of the dense 16-bit peak that the model's own arithmetic reaches, if it is known.
        document: mean tokens of a document, if documents are masked.
    """
    layout = memory.layout
    if utilisation is None and memory.gpu and BYTES[memory.precision][1] == 2 and accelerator.bandwidth is not None:
        network = dataclasses.replace(network, link=accelerator.link)
        parts = step_time(memory, accelerator, data.accumulation(layout.replicas), network, document=document)
        return Pace(parts.total, parts)
    flops = memory.config.flops_per_token(data.context_length) * data.batch_tokens
    return Pace(seconds_of(flops, layout.devices, accelerator, utilisation or accelerator.share))


def seconds_of(flops: float, devices: int, accelerator: Accelerator, utilisation: float) -> float:
    """Returns the seconds for a number of model FLOPs. Utilisation does not count recomputed blocks as work."""
    return flops / (devices * accelerator.flops * utilisation)
