"""A run's checkpoints on disk: each checkpoint is complete or absent."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_danube.options import Length, TokensOrShare

EVERY_N_STEPS = 1000
"""Default number of optimizer steps between two checkpoints of a run."""


@dataclass(frozen=True)
class SaveInterval:
    """The interval between two checkpoints, as the options of the callback `Checkpoints` state it.

    Raises:
        ValueError: both options are given, or `save_every` is neither tokens nor a share.
    """

    every_n_steps: int | None = None
    save_every: Length | None = None

    def __post_init__(self) -> None:
        if self.every_n_steps is not None and self.save_every is not None:
            raise ValueError(
                f"save_every is {self.save_every!r}, and every_n_steps is {self.every_n_steps}: both say when to save, "
                "so leave one out, or set it to null"
            )
        if self.save_every is not None:
            TokensOrShare.parse(self.save_every, "save_every")

    def steps(self, total_tokens: int, batch_tokens: int) -> int:
        """Returns the optimizer steps between two checkpoints of a run."""
        if self.save_every is not None:
            return TokensOrShare.parse(self.save_every, "save_every").steps(total_tokens, batch_tokens)
        return EVERY_N_STEPS if self.every_n_steps is None else self.every_n_steps


# --- how ShardedStrategy spreads a run --------------------------------------------------------------------------------
# Here, because `plan` reads it without PyTorch.


def parallel_sizes(data: int | str, tensor: int | str, *, nodes: int, devices: int) -> tuple[int, int]:
    """Returns the replicas of a run, and the devices of a replica.

    Args:
        data: replicas; "auto": as many as there are devices for, or one for each node if `tensor` is "auto", too.
        tensor: devices of a replica; "auto": all of a node.
        nodes, devices: nodes of the run, and devices of a node.
    """
    if tensor == "auto":
        return nodes if data == "auto" else int(data), devices
    return max(1, nodes * devices // int(tensor)) if data == "auto" else int(data), int(tensor)


def replicas_of_a_node(data: int, tensor: int, devices: int) -> int:
    """Returns how many of the `data` replicas are in one node."""
    return min(data, max(1, devices // tensor))
