"""Writes a run's checkpoints durably, and reads them as data only."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import CheckpointIO
from torch import Tensor

from lightning_danube.checkpoints.content import check_content
from lightning_danube.checkpoints.files import (
    HashingWriter,
    read_plain,
    refuse_address,
    remove_checkpoint,
    write_checkpoint,
)
from lightning_danube.checkpoints.sharded import consolidated
from lightning_danube.terminal import tell


class DurableCheckpointIO(CheckpointIO):
    """Writes and reads single-file checkpoints on local file systems. Rank zero writes with `checkpoints/files.py`.

    Lightning's own plugin writes to TMPDIR first. If TMPDIR is on another file system, a kill leaves a broken file.
    The ranks of a sharded run write with `checkpoints/sharded.py`. This plugin reads a sharded checkpoint in a run that
    is not sharded. FSDP with `state_dict_type: sharded` and DeepSpeed do not use this plugin.

    Args:
        background: copy the states to new memory of the host, and write them in a thread while training continues. The
            next save and the end of the run wait for the thread. By default, a run on a GPU does so. A run on a CPU
            does not: the copy would take the memory that training uses, and the thread would take its cores.
    """

    def __init__(self, background: bool = False) -> None:
        self.background = background
        self.writing: Path | None = None
        """The checkpoint that is being written."""
        self._thread: threading.Thread | None = None
        self._failed: BaseException | None = None
        self._lock = threading.Lock()
        self._to_remove: list[Path] | None = None  # None: the thread is done, so nothing may be left to it

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Saves a checkpoint. Its tensors may change as soon as this returns.

        Raises:
            OSError: this checkpoint, or the one before it, could not be written. Earlier checkpoints are kept.
        """
        assert storage_options is None, "a local file has no storage options"
        self.save_own(copy_of(checkpoint, {}) if self.background else checkpoint, path)

    def save_own(self, checkpoint: dict[str, Any], path: str | Path) -> None:
        """Does the same for tensors that nobody else changes."""
        refuse_address(str(path))
        self.wait()

        def write(file: HashingWriter) -> None:
            torch.save(checkpoint, file)  # type: ignore[arg-type]  # torch.save calls only write and flush

        if not self.background:
            write_checkpoint(Path(path), write)
            return
        self.writing, self._to_remove = Path(path), []
        self._thread = threading.Thread(target=self._write, args=(Path(path), write), name="checkpoint", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system gives no memory for a thread
            self._write(Path(path), write)
            self._thread = self.writing = None
            self.wait()

    def _write(self, path: Path, write: Callable[[HashingWriter], None]) -> None:
        try:
            write_checkpoint(path, write)
        except BaseException as error:
            self._failed = error
        while True:
            with self._lock:
                assert self._to_remove is not None
                if not self._to_remove or self._failed is not None:
                    self._to_remove = None
                    return
                old = self._to_remove.pop(0)
            try:
                remove_checkpoint(old)
            except OSError as error:
                self._failed = error

    def wait(self) -> None:
        """Returns when the last checkpoint is on disk.

        Raises:
            OSError: the write failed. Gives the reason and what to do.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = self.writing = None
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed

    def raise_failure(self) -> None:
        """Raises the error of a write that has failed already, without waiting for a write."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def teardown(self) -> None:
        error = sys.exception()
        try:
            self.wait()
        except OSError as failed:
            if error is None:
                raise
            tell(f"error: {failed.filename}: {failed.strerror}")  # the run ends by another error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Callable[..., Any] | None = lambda storage, location: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Reads tensors and plain data. Refuses a file that could run code, even if Lightning would load it.

        Raises:
            ValueError: the file holds other objects, or is not a checkpoint of a run.
        """
        refuse_address(str(path))
        path = Path(path)
        content = consolidated(path) if path.is_dir() else read_plain(path, map_location=map_location)
        check_content(content, path)
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        """Removes a checkpoint: now, or after the write in progress, since both change the manifest."""
        with self._lock:
            if self._to_remove is not None:
                self._to_remove.append(Path(path))
                return
        remove_checkpoint(Path(path))


def copy_of(state: Any, copies: dict[Any, Tensor]) -> Any:
    """Returns a copy in host memory. Tensors that share memory, such as tied weights, share the copy.

    Args:
        copies: the copies made so far.
    """
    if isinstance(state, Tensor):
        storage = state.untyped_storage()
        place = (
            str(state.device),
            storage.data_ptr(),
            state.storage_offset(),
            state.shape,
            state.stride(),
            state.dtype,
        )
        if place not in copies or not storage.nbytes():
            copies[place] = state.detach().to("cpu", copy=True)
        return copies[place]
    if isinstance(state, dict):
        return {key: copy_of(value, copies) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)([copy_of(value, copies) for value in state])
    return state
