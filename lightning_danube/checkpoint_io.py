"""How a run's checkpoints reach the disk and come back: durable, and as data only."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import CheckpointIO

from lightning_danube.checkpoint_files import HashingWriter, refuse_address, remove_checkpoint, write_checkpoint


class DurableCheckpointIO(CheckpointIO):
    """Checkpoints of one file on this machine's file systems, written by rank zero as `checkpoint_files` says.

    Lightning's own plugin stages in TMPDIR; on another file system, a kill then leaves a torn file. Strategies that
    shard a checkpoint over several files (FSDP with `state_dict_type: sharded`, ModelParallelStrategy, DeepSpeed) write
    and read those themselves, past this plugin.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        assert storage_options is None, "a local file has no storage options"
        refuse_address(str(path))

        def write(file: HashingWriter) -> None:
            torch.save(checkpoint, file)  # type: ignore[arg-type]  # it asks for write and flush only

        write_checkpoint(Path(path), write)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads tensors and plain data; whatever asks for code to be run is refused, also where Lightning would run it.

        Raises:
            ValueError: the file holds more than that, or is no checkpoint.
        """
        refuse_address(str(path))
        try:
            checkpoint: dict[str, Any] = torch.load(Path(path), map_location=map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            asked = re.search(r"GLOBAL (\S+)", str(error))
            what = f" (it asks for {asked[1]})" if asked else ""
            raise ValueError(
                f"{path} holds more than tensors and plain data{what}: loading it could run code, so it is refused"
            ) from error
        except (RuntimeError, EOFError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no checkpoint: {str(error).splitlines()[0]}") from error
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        remove_checkpoint(Path(path))
