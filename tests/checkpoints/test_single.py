"""Checkpoints of one file that a thread writes while training goes on. Whole runs: test_kill.py."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_danube.checkpoints import single
from lightning_danube.checkpoints.files import damage, read_manifest
from lightning_danube.checkpoints.schedule import remove_older, step_checkpoint
from lightning_danube.checkpoints.single import DurableCheckpointIO, copy_of
from lightning_danube.checkpoints.strategy import checkpoint_in_progress, raise_failed_checkpoint, wait_for_checkpoint


class Writing(DurableCheckpointIO):
    """Writes in the background, but only when the test lets it."""

    def __init__(self) -> None:
        super().__init__(background=True)
        self.may_write = threading.Event()

    def _write(self, path: Path, write: Callable[..., None]) -> None:
        assert self.may_write.wait(30), "training waits for this save"
        super()._write(path, write)


@pytest.fixture
def io() -> Iterator[Writing]:
    io = Writing()
    yield io
    io.may_write.set()


def strategy_of(io: DurableCheckpointIO) -> Any:
    return SimpleNamespace(checkpoint_io=io, remove_checkpoint=io.remove_checkpoint)


def full_disk(*args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_changes_after_the_save_is_not_in_the_checkpoint(tmp_path: Path, io: Writing) -> None:
    path = step_checkpoint(tmp_path, 3)
    weight, rates = torch.ones(4, requires_grad=True), [0.1]
    io.save_checkpoint({"state_dict": {"weight": weight}, "rates": rates, "step": 3}, path)
    assert not path.exists() and checkpoint_in_progress(strategy_of(io)) == path
    with torch.no_grad():
        weight.zero_()
    rates[0] = 0.2
    io.may_write.set()
    wait_for_checkpoint(strategy_of(io))
    loaded = io.load_checkpoint(path)
    assert torch.equal(loaded["state_dict"]["weight"], torch.ones(4)) and loaded["rates"] == [0.1]
    assert loaded["step"] == 3 and damage(path) is None and path.name in read_manifest(tmp_path)
    assert checkpoint_in_progress(strategy_of(io)) is None


def test_a_save_waits_for_the_save_before_it(tmp_path: Path, io: Writing) -> None:
    first, second = (step_checkpoint(tmp_path, step) for step in (1, 2))
    io.save_checkpoint({}, first)
    later = threading.Thread(target=io.save_checkpoint, args=({}, second))
    later.start()
    later.join(0.05)
    assert later.is_alive() and not first.exists()
    io.may_write.set()
    later.join()
    assert first.exists()
    io.wait()
    assert read_manifest(tmp_path).keys() == {first.name, second.name}


def test_an_older_checkpoint_goes_when_the_newer_is_on_disk(tmp_path: Path, io: Writing) -> None:
    io.may_write.set()
    for step in (1, 2):
        io.save_checkpoint({}, step_checkpoint(tmp_path, step))
    io.wait()
    io.may_write.clear()
    io.save_checkpoint({}, step_checkpoint(tmp_path, 3))
    remove_older(strategy_of(io), tmp_path, 3, keep=2)
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["step_00000001.ckpt", "step_00000002.ckpt"]
    io.may_write.set()
    io.wait()
    left = ["step_00000002.ckpt", "step_00000003.ckpt"]
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == left == sorted(read_manifest(tmp_path))
    remove_older(strategy_of(io), tmp_path, 3, keep=1)
    assert [path.name for path in tmp_path.glob("*.ckpt")] == left[1:], "nothing is written: removed now"


def test_a_write_that_fails_is_told_once_and_removes_nothing(
    tmp_path: Path, io: Writing, monkeypatch: pytest.MonkeyPatch
) -> None:
    io.may_write.set()
    io.save_checkpoint({}, step_checkpoint(tmp_path, 1))
    io.wait()
    io.may_write.clear()
    monkeypatch.setattr(single.torch, "save", full_disk)
    io.save_checkpoint({}, step_checkpoint(tmp_path, 2))
    raise_failed_checkpoint(strategy_of(io))  # nothing has failed yet
    remove_older(strategy_of(io), tmp_path, 2, keep=1)
    io.may_write.set()
    assert io._thread is not None
    io._thread.join()
    with pytest.raises(OSError, match="checkpoint not written: no space left on device; free some space, then resume"):
        raise_failed_checkpoint(strategy_of(io))
    for told_already in (raise_failed_checkpoint, wait_for_checkpoint):
        told_already(strategy_of(io))
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step_00000001.ckpt"]
    assert not list(tmp_path.glob(".*.partial"))


def test_the_error_that_ends_a_run_is_not_hidden_by_a_failed_write(
    tmp_path: Path, io: Writing, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(single.torch, "save", full_disk)
    io.may_write.set()
    io.save_checkpoint({}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="the run's own"):
        try:
            raise ValueError("the run's own")
        except ValueError:
            io.teardown()
            raise
    assert "a.ckpt: checkpoint not written" in capsys.readouterr().err
    io.save_checkpoint({}, tmp_path / "a.ckpt")
    with pytest.raises(OSError, match="checkpoint not written"):
        io.teardown()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_kill_in_the_background_write_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    def killed() -> None:
        io = DurableCheckpointIO(background=True)
        io.save_checkpoint({"a": torch.ones(1)}, step_checkpoint(tmp_path, 1))
        io.wait()

        def kill(checkpoint: Any, file: Any) -> None:
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)

        single.torch.save = kill  # type: ignore[assignment]
        io.save_checkpoint({"a": torch.zeros(1)}, step_checkpoint(tmp_path, 2))
        remove_older(strategy_of(io), tmp_path, 2, keep=1)
        io.wait()

    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            killed()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("*.ckpt")] == ["step_00000001.ckpt"]
    assert damage(step_checkpoint(tmp_path, 1)) is None and len(list(tmp_path.glob(".*.partial"))) == 1
    DurableCheckpointIO(background=True).save_checkpoint({}, step_checkpoint(tmp_path, 2))


def test_tensors_that_share_memory_share_the_copy() -> None:
    head = torch.arange(6.0).view(3, 2)
    state = {"embedding": head.detach(), "head": head.detach(), "rows": head[1:], "empty": [torch.empty(0)] * 2}
    copied = copy_of({"state_dict": state, "pair": (head.detach(), 1)}, {})
    shared: list[Tensor] = [copied["state_dict"]["embedding"], copied["state_dict"]["head"], copied["pair"][0]]
    assert len({tensor.data_ptr() for tensor in shared}) == 1 and shared[0].data_ptr() != head.data_ptr()
    assert torch.equal(copied["state_dict"]["rows"], head[1:]) and copied["pair"][1] == 1


def test_a_machine_without_memory_for_a_thread_saves_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(single.threading.Thread, "start", refuse)
    io, path = DurableCheckpointIO(background=True), step_checkpoint(tmp_path, 3)
    io.save_checkpoint({"step": 3}, path)
    assert damage(path) is None and torch.load(path) == {"step": 3} and io.writing is None
    io.wait()
    monkeypatch.setattr(single, "write_checkpoint", full_disk)
    with pytest.raises(OSError, match="No space left"):
        io.save_checkpoint({"step": 4}, step_checkpoint(tmp_path, 4))
