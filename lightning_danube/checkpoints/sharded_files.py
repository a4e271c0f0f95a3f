"""Reads the tensors of a sharded checkpoint, from any number of ranks or from one process alone.

torch.distributed.checkpoint would unpickle any object in its index and its entries, which could run code. Here the
entries are tensors only. Everything else is in `rest.pt`, which is read as plain data. The index may use only the few
classes that an index needs.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_danube.checkpoints.files import INDEX, one_line
from lightning_danube.files import is_out_of_memory

if TYPE_CHECKING:
    from torch.distributed.checkpoint import FileSystemReader

WEIGHT, MOMENT = "weight/", "optimizer/"
"""Prefixes of tensor names: `weight/<name>` and `optimizer/<number>/<key>/<name>`."""


def load_into(tensors: dict[str, Tensor], path: Path) -> None:
    """Fills tensors of any sharding in place. All ranks must call it.

    Raises:
        ValueError: the checkpoint is damaged, or has other tensors.
    """
    from torch.distributed.checkpoint import load as load_together

    with naming_damage(path):
        load_together(tensors, storage_reader=_reader(path))


def tensor_shapes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Returns name → (shape, dtype) of every tensor in a sharded checkpoint."""
    with naming_damage(path):
        index: Any = _reader(path).read_metadata()
        return {name: (entry.size, entry.properties.dtype) for name, entry in index.state_dict_metadata.items()}


def load_whole(path: Path, wanted: Callable[[str], bool] = lambda name: True) -> dict[str, Tensor]:
    """Reads the tensors whose names `wanted` accepts, unsharded, into the memory of this process."""
    from torch.distributed.checkpoint import load as load_together

    with naming_damage(path):
        tensors = {
            name: torch.empty(size, dtype=dtype) for name, (size, dtype) in tensor_shapes(path).items() if wanted(name)
        }
        load_together(tensors, storage_reader=_reader(path), no_dist=True)
    return tensors


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Turns whatever torch raises on the bytes of a damaged checkpoint into one line.

    torch's own exception for this is not an `Exception`, so it would pass through every handler.

    Raises:
        ValueError: an exception left the block; names the checkpoint.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (Refused, OSError):
        raise
    except (Exception, CheckpointException) as error:
        failures = error.failures if isinstance(error, CheckpointException) else {}
        cause = next((cause for cause, _ in failures.values()), error)
        if is_out_of_memory(cause):
            # A damaged size asks for any amount. Not `from error`, which would leave only the missing memory to tell.
            raise Refused(f"{path}: out of memory, or the checkpoint is damaged ({one_line(cause)})") from None
        raise Refused(f"{path} is damaged, or has other tensors: {one_line(cause)}") from error


class Refused(ValueError):
    """A sharded checkpoint cannot be read, or asks for code."""


def _reader(path: Path) -> FileSystemReader:
    from torch.distributed.checkpoint import FileSystemReader

    class PlainReader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (path / INDEX).open("rb") as file:
                index = _IndexUnpickler(file, path).load()
            index.storage_meta.load_id = self.load_id
            return index

    return PlainReader(path)


_CLASSES_OF_AN_INDEX = {
    "torch.distributed.checkpoint.metadata": frozenset(
        {
            "Metadata",
            "TensorStorageMetadata",
            "TensorProperties",
            "ChunkStorageMetadata",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        }
    ),
    "torch.distributed.checkpoint.filesystem": frozenset({"_StorageInfo"}),
}


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles only the classes that an index of tensors consists of."""

    def __init__(self, file: Any, path: Path) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES_OF_AN_INDEX.get(module, ()):
            return super().find_class(module, name)
        if name in ("Path", "PosixPath") and module.startswith("pathlib"):
            return PurePath  # the path where the index was written
        plain = getattr(torch, name, None) if module == "torch" else None
        if plain is torch.Size or isinstance(plain, torch.dtype | torch.layout):
            return plain
        if (module, name) in (("torch.serialization", "_get_layout"), ("collections", "OrderedDict")):
            return super().find_class(module, name)
        raise Refused(f"{self._path}: its index asks for {module}.{name}: loading it could run code, so it is refused")
