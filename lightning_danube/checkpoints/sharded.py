"""Sharded checkpoints: all ranks write one directory together, each rank its part. It is complete or absent.

The directory is written under a hidden name and renamed when every part is on disk. sharded_files.py reads it.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_danube.checkpoints.files import (
    REST,
    HashingWriter,
    Listed,
    forget,
    not_written,
    prepare_directory,
    read_plain,
    write_list,
)
from lightning_danube.checkpoints.sharded_files import MOMENT, WEIGHT, load_whole, naming_damage
from lightning_danube.files import finish_folder, scratch_folder

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Saver:
    """Saves checkpoints while training continues.

    `save` waits only until the tensors are copied to host memory. Then a thread of each rank writes them, one
    checkpoint at a time. The threads use their own process group, which is gloo even if training uses another back
    end. They end with the process, and the next save removes an unfinished checkpoint.

    Args:
        timeout: how long a thread waits for the threads of the other ranks.
    """

    def __init__(self, timeout: timedelta | None) -> None:
        self._timeout = timeout
        self._group: ProcessGroup | None = None
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None

    def open(self) -> None:
        """Makes the process group of the threads, if there is none. All ranks call it.

        It is called when a run is set up: nodes that cannot reach each other by gloo then fail at the start, and not
        at the first save.
        """
        import torch.distributed as dist

        if self._group is None:
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)

    def save(self, tensors: dict[str, Tensor], rest: dict[str, Any], path: Path) -> None:
        """Starts saving a checkpoint. All ranks call it, each with its part of the tensors.

        The tensors may change as soon as this returns.

        Raises:
            OSError: this checkpoint cannot be started, or the previous checkpoint failed. Earlier checkpoints are kept.
        """
        import torch.distributed as dist
        from torch.distributed.checkpoint.staging import BlockingAsyncStager

        self.wait()
        self.open()
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
        """Returns when this rank's part of the last checkpoint is on disk.

        Raises:
            OSError: the write failed. Gives the reason and what to do.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def _write(self, tensors: dict[str, Tensor], rest: bytes, folder: ExitStack, hidden: Path, path: Path) -> None:
        """Writes this rank's part. On rank zero, `folder` keeps the hidden folder until the checkpoint is complete."""
        import torch.distributed as dist
        from torch.distributed.checkpoint import FileSystemWriter
        from torch.distributed.checkpoint import save as save_together
        from torch.distributed.checkpoint.api import CheckpointException

        try:
            with folder:
                # Each machine flushes the files of its own ranks.
                writer = FileSystemWriter(hidden, sync_files=True)
                writer.fs = files = _hashing_files()
                save_together(tensors, storage_writer=writer, process_group=self._group)
                all_files: list[Any] = [None] * dist.get_world_size(self._group)
                dist.all_gather_object(all_files, files.listed(), group=self._group)
                if dist.get_rank() == 0:
                    _complete(rest, hidden, path, {name: one for listed in all_files for name, one in listed.items()})
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            self._failed = not_written(path, cause, f" (rank {rank})")
            self._failed.__cause__ = error
        except OSError as error:
            self._failed = not_written(path, error)
            self._failed.__cause__ = error
        except BaseException as error:
            self._failed = error


def _hashing_files() -> Any:
    """Returns torch's access to local files, which also hashes each file as it is written: reading it again would cost
    as much as writing it, and would not notice what the disk has damaged meanwhile."""
    from torch.distributed.checkpoint.filesystem import FileSystem

    class HashingFiles(FileSystem):
        def __init__(self) -> None:
            self._written: dict[str, HashingWriter] = {}

        @contextmanager
        def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
            with super().create_stream(path, mode) as file:
                if mode == "wb":
                    file = self._written[Path(path).name] = HashingWriter(file)  # type: ignore[assignment, arg-type]
                yield file

        def rename(self, path: Any, new_path: Any) -> None:
            super().rename(path, new_path)
            self._written[Path(new_path).name] = self._written.pop(Path(path).name)

        def listed(self) -> dict[str, Listed]:
            return {name: Listed(file.size, file.sha256()) for name, file in self._written.items()}

    return HashingFiles()


def _complete(rest: bytes, hidden: Path, path: Path, listed: Mapping[str, Listed]) -> None:
    """Adds the non-tensor data and the file list to a checkpoint with all tensors, then renames it to `path`."""
    with (hidden / REST).open("wb") as file:
        writer = HashingWriter(file)
        writer.write(rest)
    listed = {**listed, REST: Listed(writer.size, writer.sha256())}
    assert listed.keys() == {part.name for part in hidden.iterdir()}, "a file without a hash"
    write_list(hidden, listed)
    forget(path)  # the same step may have been saved before as one file
    finish_folder(hidden, path, replace=True)


def read_rest(path: Path) -> dict[str, Any]:
    """Reads everything except the tensors of the model and the optimizers.

    Raises:
        ValueError: it is damaged, or another program wrote it.
    """
    rest = read_plain(path / REST)
    if not isinstance(rest.get("optimizer_groups"), list):
        raise ValueError(f"{path / REST} is damaged, or another program wrote it: it holds no optimizer_groups")
    return rest


def consolidated(path: Path) -> dict[str, Any]:
    """Reads a sharded checkpoint as the content of a single-file checkpoint, in Lightning's layout."""
    rest, tensors = read_rest(path), load_whole(path)
    groups = rest.pop("optimizer_groups")
    states = []
    with naming_damage(path):
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
    """Converts an optimizer's state from parameter names to parameter numbers, the layout of torch's state dicts."""
    names = [name for group in groups for name in group["params"]]
    number = {name: place for place, name in enumerate(names)}
    return {
        "state": {number[name]: dict(values) for name, values in state.items()},
        "param_groups": [{**group, "params": [number[name] for name in group["params"]]} for group in groups],
    }
