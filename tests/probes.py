"""Callbacks that only tests name: they write down what was trained on and what came of it, or spoil a step."""

import errno
import hashlib
import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_danube.signals import SIGNALS


class KeysOfSteps(Callback):
    """Writes the keys of each micro-batch to `<directory>/keys-<rank>.jsonl`, with the step it belongs to."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        mesh = pl_module.device_mesh
        if mesh is not None and mesh["tensor_parallel"].get_local_rank():
            return  # the devices of a replica have the same rows
        self.directory.mkdir(parents=True, exist_ok=True)
        line = [trainer.global_step, batch_idx, [list(key) for key in batch["keys"]]]
        with (self.directory / f"keys-{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def samples_of_steps(directory: Path) -> list[list[list[int]]]:
    """Keys of each step in the order of the run: micro-batch after micro-batch, in each the ranks in turn."""
    lines = [
        (step, batch, rank, keys)
        for rank, path in enumerate(sorted(directory.glob("keys-*.jsonl")))
        for step, batch, keys in map(json.loads, path.read_text().splitlines())
    ]
    steps: dict[int, list[list[int]]] = {}
    for step, _, _, keys in sorted(lines, key=lambda line: line[:3]):
        steps.setdefault(step, []).extend(keys)
    return [steps[step] for step in sorted(steps)]


class BatchesOfSteps(Callback):
    """Appends the step, the number and the hash of each micro-batch to `<directory>/batches.jsonl`. For any task."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256(batch["input_ids"].numpy().tobytes()).hexdigest()[:16]
        with (self.directory / "batches.jsonl").open("a") as file:
            file.write(json.dumps([trainer.global_step, batch_idx, digest]) + "\n")


class StopAt(Callback):
    """Asks the trainer to end after a micro-batch, as a timer does."""

    def __init__(self, micro_batch: int) -> None:
        self.micro_batch = micro_batch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == self.micro_batch:
            trainer.should_stop = True


class LossesOfSteps(Callback):
    """Writes the loss of each step to `<directory>/losses.jsonl` in full; TensorBoard keeps float32."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self._written: int | None = None

    def _write(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if self._written is not None and step > self._written and trainer.is_global_zero:
            self.directory.mkdir(parents=True, exist_ok=True)
            with (self.directory / "losses.jsonl").open("a") as file:
                file.write(json.dumps([step, float(trainer.callback_metrics["loss/train"])]) + "\n")
        self._written = step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)


def losses_of_steps(directory: Path) -> dict[int, float]:
    """Step, from 1 → its loss."""
    return dict(map(json.loads, (directory / "losses.jsonl").read_text().splitlines()))


class Poison(Callback):
    """Spoils chosen optimizer steps.

    Args:
        steps: numbers of the steps, from 1.
        what: "loss" makes the loss nan, and with it the gradient; "gradient" one entry of the gradient inf, after the
            ranks have averaged theirs; "spike" multiplies the loss by a hundred.
        rank: the only rank that does it; all do without.
        micro_batch: the only micro-batch of the step that is spoilt.
    """

    def __init__(self, steps: list[int], what: str, rank: int | None = None, micro_batch: int = 0) -> None:
        self.steps, self.what, self.rank, self.micro_batch = steps, what, rank, micro_batch

    def _now(self, trainer: Trainer, batch_idx: int) -> bool:
        mine = self.rank is None or self.rank == trainer.global_rank
        here = batch_idx % trainer.accumulate_grad_batches == self.micro_batch
        return mine and here and trainer.global_step + 1 in self.steps

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = pl_module.training_step
        factor = {"loss": float("nan"), "spike": 100.0, "gradient": 1.0}[self.what]

        def training_step(batch: Any, batch_idx: int) -> Any:
            if not self._now(trainer, batch_idx):
                return step(batch, batch_idx)
            loss: Any = step(batch, batch_idx)
            loss = loss * factor
            pl_module._losses[-1] = loss.detach()  # type: ignore[operator]
            return loss

        pl_module.training_step = training_step  # type: ignore[method-assign]

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        mine = self.rank is None or self.rank == trainer.global_rank
        if self.what == "gradient" and mine and trainer.global_step + 1 in self.steps:
            gradient = next(pl_module.parameters()).grad
            assert gradient is not None
            gradient.view(-1)[0] = float("inf")


class Fail(Callback):
    """Makes one rank, or each, fail before a micro-batch.

    Args:
        what: "disk" raises what a file system does, which a user can fix; "fault" what a mistake in the code
            does; "kill" is the SIGKILL of a system without memory; "hang" does nothing any more, for ever.
        micro_batch: number of the micro-batch, from 0.
        rank: the only rank that fails.
    """

    def __init__(self, what: str, micro_batch: int, rank: int | None = None) -> None:
        self.what, self.micro_batch, self.rank = what, micro_batch, rank

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx != self.micro_batch or self.rank not in (None, trainer.global_rank):
            return
        if self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.what == "hang":
            threading.Event().wait()
        if self.what == "disk":
            raise OSError(errno.EIO, os.strerror(errno.EIO), "web.arrow")
        raise RuntimeError("a fault of ours")


class KillInSave(Callback):
    """Kills one rank in the midst of a save that all ranks write together.

    Args:
        moment: "part", when the rank's part is written and before the others know; "rename", on rank zero, when all
            parts are and the checkpoint has not its name yet.
        rank: that is killed.
        save: number of the save, from 1.
    """

    def __init__(self, moment: str, rank: int, save: int) -> None:
        self.moment, self.rank, self.saves_left = moment, rank, save

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_rank != self.rank:
            return
        from torch.distributed.checkpoint import FileSystemWriter

        from lightning_danube.checkpoints import sharded as sharded_checkpoints

        owner: Any = FileSystemWriter if self.moment == "part" else sharded_checkpoints
        name = "write_data" if self.moment == "part" else "finish_folder"
        original = getattr(owner, name)

        def kill(*args: Any, **kwargs: Any) -> Any:
            self.saves_left -= 1
            if self.saves_left == 0 and self.moment == "rename":
                os.kill(os.getpid(), signal.SIGKILL)
            done = original(*args, **kwargs)
            if self.saves_left == 0:
                done.wait()
                os.kill(os.getpid(), signal.SIGKILL)
            return done

        setattr(owner, name, kill)


class HoldSave(Callback):
    """Has the first save that all ranks write together wait until training has come to a step.

    Args:
        until: the step; a save that training waits for fails after half a minute.
        fail: then one rank's part can not be written: "disk", as the file system says it.
    """

    def __init__(self, until: int, fail: str | None = None) -> None:
        self.until, self.fail = until, fail
        self._reached = threading.Event()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from torch.distributed.checkpoint import FileSystemWriter

        original = FileSystemWriter.write_data

        def write(*args: Any, **kwargs: Any) -> Any:
            if not self._reached.wait(30):
                raise TimeoutError("training waits for this save")
            if self.fail == "disk" and trainer.global_rank == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return original(*args, **kwargs)

        FileSystemWriter.write_data = write  # type: ignore[method-assign]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step >= self.until:
            self._reached.set()


class Halt(Checkpoint):
    """Has each rank wait once, until its first signal or the file "go". Writes `halted-<rank>`: its process and node.

    Lightning calls it after `Checkpoints`, if it comes after that.

    Args:
        directory: for the files. A run that resumes later does not wait again.
        where: name of the hook: "setup", "on_train_batch_start", "on_train_end" or "teardown".
        step: of "on_train_batch_start", the number of optimizer steps that are done.
    """

    def __init__(self, directory: str, where: str = "on_train_batch_start", step: int = 0) -> None:
        self.directory, self.where, self.step = Path(directory), where, step

    def _wait(self, trainer: Trainer, where: str) -> None:
        mark = self.directory / f"halted-{trainer.global_rank}"
        if where != self.where or mark.exists():
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        hidden = mark.with_name(f".{mark.name}")
        hidden.write_text(f"{os.getpid()} {os.environ.get('SLURMD_NODENAME', '')}")
        answered = SIGNALS.answered
        hidden.rename(mark)
        while SIGNALS.answered == answered and not (self.directory / "go").exists():
            time.sleep(0.05)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._wait(trainer, "setup")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            self._wait(trainer, "on_train_batch_start")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._wait(trainer, "on_train_end")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._wait(trainer, "teardown")
