"""How an optimizer step is dealt to data-parallel replicas."""

from __future__ import annotations

from lightning.pytorch import Trainer


def replicas_of(trainer: Trainer | None) -> tuple[int, int]:
    """Number of data-parallel replicas and this one's; `global_rank` would be wrong under tensor parallelism."""
    replicas = (trainer and trainer.distributed_sampler_kwargs) or {"num_replicas": 1, "rank": 0}
    return int(replicas["num_replicas"]), int(replicas["rank"])


def accumulation(key: str, batch: int, micro_batch_size: int, replicas: int) -> int:
    """Micro-batches of one optimizer step on each replica.

    Raises:
        ValueError: `batch` examples, which `data.<key>` asks for, cannot be dealt evenly.
    """
    held = replicas * micro_batch_size
    if batch % held:
        near = max(1, round(batch / held)) * held
        raise ValueError(
            f"data.{key} is {batch}, which {replicas} device(s) × data.micro_batch_size {micro_batch_size} do not "
            f"divide: {near} would work"
        )
    return batch // held
