"""Checkpoints that all ranks write together: a directory with a part of each rank, whole or not there.

It is written under a hidden name and renamed when every part is on the disk. model/sharded_files.py reads it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_danube.checkpoint_files import (
    FILES,
    TEMPORARY,
    prepare_directory,
    read_plain,
    remove_checkpoint,
    sync_directory,
)
from lightning_danube.model.sharded_files import MOMENT, REST, WEIGHT, load_whole


def save(tensors: dict[str, Tensor], rest: dict[str, Any], path: Path) -> None:
    """Called by all ranks, each with its part of the tensors; returns when the checkpoint is on the disk.

    Raises:
        OSError: rank zero could not write; what was there before still is.
    """
    import torch.distributed as dist
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint import save as save_together

    first = dist.get_rank() == 0
    hidden = path.with_name(f".{path.name}{TEMPORARY}")
    if first:
        prepare_directory(path.parent)
        hidden.mkdir()
    dist.barrier()
    save_together(tensors, storage_writer=FileSystemWriter(hidden, sync_files=True))
    if first:
        with (hidden / REST).open("wb") as file:
            torch.save(rest, file)
            file.flush()
            os.fsync(file.fileno())
        sizes = {part.name: part.stat().st_size for part in sorted(hidden.iterdir())}
        with (hidden / FILES).open("w", encoding="utf-8") as listing:
            listing.write(json.dumps(sizes, indent=2) + "\n")
            listing.flush()
            os.fsync(listing.fileno())
        sync_directory(hidden)
        remove_checkpoint(path)  # the same step, saved before
        os.replace(hidden, path)
        sync_directory(path.parent)
    dist.barrier()


def read_rest(path: Path) -> dict[str, Any]:
    """All that is no tensor of the model or the optimizer."""
    return read_plain(path / REST)


def consolidated(path: Path) -> dict[str, Any]:
    """What a checkpoint of one file would hold, in Lightning's layout."""
    rest, tensors = read_rest(path), load_whole(path)
    groups = rest.pop("optimizer_groups")
    states = []
    for number, of_optimizer in enumerate(groups):
        state: dict[str, dict[str, Tensor]] = {}
        prefix = f"{MOMENT}{number}/"
        for name, tensor in tensors.items():
            if name.startswith(prefix):
                key, parameter = name.removeprefix(prefix).split("/", 1)
                state.setdefault(parameter, {})[key] = tensor
        states.append(numbered(state, of_optimizer))
    weights = {n.removeprefix(WEIGHT): tensor for n, tensor in tensors.items() if n.startswith(WEIGHT)}
    return {**rest, "state_dict": weights, "optimizer_states": states}


def numbered(state: Mapping[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """An optimizer's state by parameters' names → by their numbers, as torch's optimizers give and take it."""
    names = [name for group in groups for name in group["params"]]
    number = {name: place for place, name in enumerate(names)}
    return {
        "state": {number[name]: dict(values) for name, values in state.items()},
        "param_groups": [{**group, "params": [number[name] for name in group["params"]]} for group in groups],
    }
