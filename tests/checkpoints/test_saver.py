"""Checkpoints that ranks write together while training goes on. Whole runs: test_sharded_runs.py."""

import errno
import hashlib
import json
import os
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_danube.checkpoints.files import FILES, damage
from lightning_danube.checkpoints.sharded import Saver, read_rest
from lightning_danube.checkpoints.sharded_files import load_whole
from lightning_danube.checkpoints.strategy import take_part
from tests.ranks import on_ranks

REST: dict[str, Any] = {"global_step": 3, "optimizer_groups": []}
WHOLE = torch.arange(12.0).view(6, 2)


def parts(whole: Tensor = WHOLE) -> dict[str, Tensor]:
    """A tensor of which each rank has some rows, and one that all have."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return {"weight/a": distribute_tensor(whole, mesh, [Shard(0)]), "weight/b": whole[0].clone()}


def saver() -> Saver:
    return Saver(timedelta(minutes=1))


def test_each_rank_flushes_its_part_and_rank_zero_all_before_the_name(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "step_00000003.ckpt"

    def work(rank: int) -> None:
        events: list[tuple[str, int]] = []
        flush, replace = os.fsync, os.replace

        def record_flush(handle: int) -> None:
            flush(handle)
            events.append(("flush", os.fstat(handle).st_ino))

        def record_rename(old: Any, new: Any) -> None:
            events.append(("rename", os.stat(old).st_ino))
            replace(old, new)

        os.fsync, os.replace = record_flush, record_rename  # type: ignore[assignment]
        writing = saver()
        writing.save(parts(), REST, path)
        writing.wait()
        dist.barrier()
        if rank:
            (own,) = path.glob(f"__{rank}_*.distcp")
            assert ("flush", own.stat().st_ino) in events
            return
        renamed = events.index(("rename", path.stat().st_ino))
        for file in (path, *path.iterdir()):
            assert ("flush", file.stat().st_ino) in events[:renamed], file
        assert ("flush", path.parent.stat().st_ino) in events[renamed:]

    on_ranks(work)
    assert [file.name for file in path.parent.iterdir()] == [path.name] and damage(path) is None
    assert torch.equal(load_whole(path)["weight/a"], WHOLE) and read_rest(path) == REST


def test_every_file_is_listed_with_its_size_and_the_hash_of_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "step_00000003.ckpt"

    def work(rank: int) -> None:
        writing = saver()
        writing.save(parts(), REST, path)
        writing.wait()

    on_ranks(work)
    listed = json.loads((path / FILES).read_text())
    assert listed.keys() == {".metadata", "__0_0.distcp", "__1_0.distcp", "rest.pt"}
    for name, one in listed.items():
        content = (path / name).read_bytes()
        assert one == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "step_00000003.ckpt"

    def work(rank: int) -> None:
        writing = saver()
        for factor in (1, 2):
            writing.save(parts(factor * WHOLE), {**REST, "factor": factor}, path)
        writing.wait()

    on_ranks(work, ranks=1)
    assert torch.equal(load_whole(path)["weight/a"], 2 * WHOLE) and read_rest(path)["factor"] == 2
    assert damage(path) is None and list(tmp_path.iterdir()) == [path]


def test_tensors_may_change_while_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "step_00000003.ckpt"

    def work(rank: int) -> None:
        changed, write = threading.Event(), FileSystemWriter.write_data

        def write_later(*args: Any) -> Any:
            assert changed.wait(30), "training waits for this save"
            return write(*args)

        FileSystemWriter.write_data = write_later  # type: ignore[method-assign, assignment]
        writing, tensors = saver(), parts()
        writing.save(tensors, REST, path)
        for tensor in tensors.values():
            tensor.zero_()
        changed.set()
        writing.wait()

    on_ranks(work, ranks=1)
    loaded = load_whole(path)
    assert torch.equal(loaded["weight/a"], WHOLE) and torch.equal(loaded["weight/b"], WHOLE[0])


def test_a_part_that_can_not_be_written_is_told_with_its_rank(tmp_path: Path) -> None:
    path = tmp_path / "step_00000003.ckpt"

    def refuse(*args: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def work(rank: int) -> None:
        if rank:
            FileSystemWriter.write_data = refuse  # type: ignore[method-assign, assignment]
        writing = saver()
        writing.save(parts(), REST, path)
        with pytest.raises(OSError, match=r"not written \(rank 1\): no space left on device; free some space") as error:
            writing.wait()
        assert error.value.errno == errno.ENOSPC
        writing.wait()  # told once

    on_ranks(work)
    assert list(tmp_path.iterdir()) == []


def test_each_rank_takes_its_part_of_a_whole_tensor() -> None:
    def work(rank: int) -> None:
        target: Any = parts(torch.zeros(6, 2))["weight/a"]
        take_part(target, WHOLE)
        assert torch.equal(target.to_local(), WHOLE[3 * rank : 3 * rank + 3])
        assert torch.equal(target.full_tensor(), WHOLE)

    on_ranks(work)
