"""Leaves out optimizer steps whose loss or gradient is not finite, or whose loss leaps, and stops when they persist."""

from __future__ import annotations

import json
import math
from collections import deque
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_danube.callbacks.progress import say
from lightning_danube.checkpoints.runs import newest_checkpoint
from lightning_danube.device import widest_float
from lightning_danube.files import write_text
from lightning_danube.pretraining.position import curriculum_of
from lightning_danube.training.position import at_logged_step, run_directory


class TrainingStopped(RuntimeError):
    """Training cannot usefully go on; the message says from where it can."""

    @property
    def user_message(self) -> str:
        return str(self)


class SkipBadSteps(Callback):
    """Skips bad optimizer steps, on all ranks alike, and writes down what was in them.

    A skipped step leaves weights and optimizer state bitwise as they were, yet counts as a step: its samples are passed
    over, so that the place in the data stays steps × batch. `skipped.jsonl` in the run's directory names the samples.

    The decision is made and obeyed on the device. The host reads it one step late on a GPU, when it has long been
    there, so that it never waits for the step that it has just sent off.

    Args:
        stop_after: stop the run after so many skipped steps in a row.
        spike_deviations: also skip a step whose loss is so many standard deviations above the mean of the last
            `spike_window` losses that counted. Off by default.
        spike_window: steps of that mean and deviation; nothing is a spike before they are full.

    Logs `optimizer/skipped_steps`, of the whole run.
    """

    def __init__(self, stop_after: int = 5, spike_deviations: float | None = None, spike_window: int = 128) -> None:
        if stop_after < 1:
            raise ValueError(f"stop_after is {stop_after}: give the number of skipped steps in a row, at least 1")
        if spike_deviations is not None and not spike_deviations > 0:
            raise ValueError(f"spike_deviations is {spike_deviations}: give a positive number such as 6, or null")
        if spike_window < 2:
            raise ValueError(f"spike_window is {spike_window}: a deviation needs at least 2 losses")
        self.stop_after, self.spike_deviations, self.spike_window = stop_after, spike_deviations, spike_window
        self.skipped = 0
        """Steps skipped in the whole run."""
        self._in_a_row = 0
        self._recent = torch.zeros(spike_window, dtype=torch.float64)
        self._counted = torch.zeros((), dtype=torch.int64)
        self._latest: Tensor | None = None
        self._unread: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    # --- the decision, on the device ----------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device
        self._recent, self._counted = self._recent.to(device, widest_float(device)), self._counted.to(device)
        pl_module.step_verdict = self._verdict  # type: ignore[assignment]
        if trainer.is_global_zero:
            # Steps after the checkpoint are done again, and written again if they are skipped again.
            path = run_directory(trainer) / "skipped.jsonl"
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                write_text(path, "".join(line for line in lines if json.loads(line)["step"] <= trainer.global_step))

    def _verdict(self, loss: Tensor, norm: Tensor) -> Tensor:
        loss, norm = (x.detach().to(self._recent.dtype) for x in (loss, norm))
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        spike = torch.zeros_like(finite)
        if self.spike_deviations is not None:
            limit = self._recent.mean() + self.spike_deviations * self._recent.std()
            spike = finite & (self._counted >= self.spike_window) & (loss > limit)
            counts = finite & ~spike
            self._recent = torch.where(counts, torch.cat([self._recent[1:], loss[None]]), self._recent)
            self._counted = self._counted + counts
        skip = ~finite | spike
        self._latest = torch.stack([skip.to(loss.dtype), spike.to(loss.dtype), loss, norm])
        return skip

    # --- the record, on the host --------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._latest is not None:
            latest, self._latest = self._latest, None
            event = None
            if latest.is_cuda:
                latest = latest.to("cpu", non_blocking=True)
                event = torch.cuda.Event()
                event.record()
            self._unread.append((trainer.global_step, latest, event))
            self.read(trainer, all_but=0 if event is None else 1)
        if at_logged_step(trainer, batch_idx):
            for logger in trainer.loggers:
                logger.log_metrics({"optimizer/skipped_steps": float(self.skipped)}, step=trainer.global_step)

    def read(self, trainer: Trainer, all_but: int = 0) -> None:
        """Takes note of the steps decided so far, save the newest `all_but`; every rank reads the same."""
        while len(self._unread) > all_but:
            step, values, event = self._unread.popleft()
            if event is not None:
                event.synchronize()
            skip, spike, loss, norm = values.tolist()
            self._in_a_row = self._in_a_row + 1 if skip else 0
            if skip:
                self.skipped += 1
                self._write(trainer, step, "spike" if spike else _what_is_not_finite(loss, norm), loss, norm)
            if self._in_a_row >= self.stop_after:
                self._unread.clear()
                raise TrainingStopped(self._last_words(trainer, step))

    def _write(self, trainer: Trainer, step: int, cause: str, loss: float, norm: float) -> None:
        say(trainer, f"step {step} skipped: {cause} (loss {loss:.4g}, gradient norm {norm:.4g})")
        if not trainer.is_global_zero:
            return
        data, curriculum = curriculum_of(trainer)
        # What stands at a position is computed, so no rank has to tell another what it held.
        keys = curriculum.samples((step - 1) * data.batch_samples, step * data.batch_samples)
        record = {
            "step": step,
            "cause": cause,
            "loss": _json_number(loss),
            "gradient_norm": _json_number(norm),
            "samples": [
                {
                    "stage": curriculum.stages[key.stage].name,
                    "source": curriculum.sources[key.source],
                    "epoch": key.epoch,
                    "row": key.row,
                }
                for key in keys
            ],
        }
        path = run_directory(trainer) / "skipped.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _last_words(self, trainer: Trainer, step: int) -> str:
        what = f"{self._in_a_row} optimizer steps in a row were skipped, up to step {step}"
        if not trainer.is_global_zero:
            return what
        run = run_directory(trainer)
        good = newest_checkpoint(run)
        where = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        return f"{what} ({run / 'skipped.jsonl'} names their samples): {where}"

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.read(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.read(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.read(trainer)
        checkpoint["skipped_steps"] = {
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "recent": self._recent.cpu(),
            "counted": self._counted.cpu(),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("skipped_steps")
        if saved is None or trainer.state.fn != "fit":
            return
        self.skipped, self._in_a_row = saved["skipped"], saved["in_a_row"]
        if len(saved["recent"]) == self.spike_window:
            self._recent, self._counted = saved["recent"].clone(), saved["counted"].clone()


def _what_is_not_finite(loss: float, norm: float) -> str:
    return "loss is not finite" if not math.isfinite(loss) else "gradient is not finite"


def _json_number(value: float) -> float | str:
    """JSON has no nan and no infinity."""
    return value if math.isfinite(value) else str(value)


def skipped_steps(trainer: Trainer) -> int:
    """Steps skipped in the run so far; 0 where nothing skips."""
    callbacks = [callback for callback in trainer.callbacks if isinstance(callback, SkipBadSteps)]  # type: ignore[attr-defined]
    for callback in callbacks:
        callback.read(trainer)
    return sum(callback.skipped for callback in callbacks)
