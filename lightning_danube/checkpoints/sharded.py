"""Checkpoints that all ranks write together: a directory with a part of each rank, whole or not there.

It is written under a hidden name and renamed when every part is on the disk. sharded_files.py reads it.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_danube.checkpoints.files import (
    FILES,
    forget,
    not_written,
    prepare_directory,
    read_plain,
)
from lightning_danube.checkpoints.sharded_files import MOMENT, REST, WEIGHT, load_whole
from lightning_danube.files import finish_folder, scratch_folder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Saver:
    """Saves while training goes on: it waits for a copy in the host's memory, a thread of each rank does the rest.

    One checkpoint at a time. The threads talk over a process group of their own, on gloo also where training is on
    another back end. They end with the process, and the next save removes what they had not finished.

    Args:
        timeout: how long a thread waits for those of the other ranks.
    """

    def __init__(self, timeout: timedelta | None) -> None:
        self._timeout = timeout
        self._group: ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def save(self, tensors: dict[str, Tensor], rest: dict[str, Any], path: Path) -> None:
        """Called by all ranks, each with its part of the tensors, which may change as soon as this returns.

        Raises:
            OSError: this checkpoint can not be begun, or the one before was not finished; those before it are there.
        """
        import torch.distributed as dist
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        self.wait()
        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        folder = ExitStack()
        plain = io.BytesIO()
        hidden = [Path()]
        if dist.get_rank() == 0:
            prepare_directory(path.parent)
            hidden = [folder.enter_context(scratch_folder(path))]
            torch.save(rest, plain)
        dist.broadcast_object_list(hidden, src=0, group=self._group)
        staged = BlockingAsyncStager().stage(tensors)
        self._thread = threading.Thread(
            target=self._write, args=(staged, plain.getvalue(), folder, *hidden, path), name="checkpoint", daemon=True
        )
        self._thread.start()

    def wait(self) -> None:
        """Returns when the last checkpoint is on the disk, as far as this rank has to do with it.

        Raises:
            OSError: it is not, with the reason and what to do.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def _write(self, tensors: dict[str, Tensor], rest: bytes, folder: ExitStack, hidden: Path, path: Path) -> None:
        """Writes this rank's part. `folder` is what rank zero holds open until the checkpoint is complete."""
        import torch.distributed as dist
        from torch.distributed.checkpoint import FileSystemWriter
        from torch.distributed.checkpoint import save as save_together
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            with folder:
                # Each machine flushes what its own ranks have written.
                writer = FileSystemWriter(hidden, sync_files=True)
                save_together(tensors, storage_writer=writer, process_group=self._group)
                if dist.get_rank() == 0:
                    _complete(rest, hidden, path)
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            self._failed = not_written(path, cause, f" (rank {rank})")
            self._failed.__cause__ = error
        except OSError as error:
            self._failed = not_written(path, error)
            self._failed.__cause__ = error
        except BaseException as error:
            self._failed = error


def _complete(rest: bytes, hidden: Path, path: Path) -> None:
    """Adds the rest and the list of files to a checkpoint that has all tensors, and gives the checkpoint its name."""
    (hidden / REST).write_bytes(rest)
    sizes = {part.name: part.stat().st_size for part in sorted(hidden.iterdir())}
    (hidden / FILES).write_text(json.dumps(sizes, indent=2) + "\n")
    forget(path)  # the same step, saved before into one file
    finish_folder(hidden, path, replace=True)


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
