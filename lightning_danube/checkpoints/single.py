"""Writes a run's checkpoints durably, and reads them as data only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import CheckpointIO

from lightning_danube.checkpoints.files import (
    HashingWriter,
    read_plain,
    refuse_address,
    remove_checkpoint,
    write_checkpoint,
)
from lightning_danube.checkpoints.sharded import consolidated


class DurableCheckpointIO(CheckpointIO):
    """Writes and reads single-file checkpoints on local file systems. Rank zero writes with `checkpoints/files.py`.

    Lightning's own plugin writes to TMPDIR first. If TMPDIR is on another file system, a kill leaves a broken file.
    The ranks of a sharded run write with `checkpoints/sharded.py`. This plugin reads a sharded checkpoint in a run that
    is not sharded. FSDP with `state_dict_type: sharded` and DeepSpeed do not use this plugin.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        assert storage_options is None, "a local file has no storage options"
        refuse_address(str(path))

        def write(file: HashingWriter) -> None:
            torch.save(checkpoint, file)  # type: ignore[arg-type]  # torch.save calls only write and flush

        write_checkpoint(Path(path), write)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads tensors and plain data. Refuses a file that could run code, even if Lightning would load it.

        Raises:
            ValueError: the file holds other objects, or is no checkpoint.
        """
        refuse_address(str(path))
        if Path(path).is_dir():
            return consolidated(Path(path))
        return read_plain(Path(path), map_location=map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        remove_checkpoint(Path(path))
