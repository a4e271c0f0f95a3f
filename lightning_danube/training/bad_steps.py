"""Which optimizer steps to skip: decided on the device, read on the host, and recorded in `skipped.jsonl`."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_danube.checkpoints.runs import newest_checkpoint
from lightning_danube.device import widest_float
from lightning_danube.files import append_line, read_json_lines, write_text
from lightning_danube.terminal import counted


class TrainingStopped(RuntimeError):
    """Raised when training cannot usefully continue. The message names the checkpoint to resume from."""

    @property
    def user_message(self) -> str:
        return str(self)


class BadStep(NamedTuple):
    """An optimizer step that was skipped, and why."""

    step: int
    cause: str
    loss: float
    gradient_norm: float

    def __str__(self) -> str:
        return f"step {self.step} skipped: {self.cause} (loss {self.loss:.4g}, gradient norm {self.gradient_norm:.4g})"


class BadSteps:
    """Decides which optimizer steps to skip: those whose loss or gradient is not finite, and spikes of the loss.

    The decision is made on the device. The host reads the decision later, so that it does not wait for the device.

    Args:
        spike_deviations: a loss is a spike if it is this many standard deviations above the mean of the last
            `spike_window` losses, without skipped steps; None: no loss is a spike.
        spike_window: number of losses in that mean and deviation. No loss is a spike before the window is full.
        stop_after: number of skipped steps in a row after which the run stops.

    Raises:
        ValueError: a number is out of range.
    """

    def __init__(self, spike_deviations: float | None = None, spike_window: int = 128, stop_after: int = 5) -> None:
        if stop_after < 1:
            raise ValueError(f"stop_after is {stop_after}: give the number of skipped steps in a row, at least 1")
        if spike_deviations is not None and not spike_deviations > 0:
            raise ValueError(f"spike_deviations is {spike_deviations}: give a positive number such as 6, or null")
        if spike_window < 2:
            raise ValueError(f"spike_window is {spike_window}: a deviation needs at least 2 losses")
        self.spike_deviations, self.spike_window, self.stop_after = spike_deviations, spike_window, stop_after
        self.skipped = 0
        """Skipped steps of the whole run whose decisions were read."""
        self.in_a_row = 0
        """Number of skipped steps in a row, ending at the last decision that was read."""
        self._recent = torch.zeros(spike_window, dtype=torch.float64)
        self._counted = torch.zeros((), dtype=torch.int64)
        self._latest: Tensor | None = None
        self._unread: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    # --- on the device ------------------------------------------------------------------------------------------------

    def move_to(self, device: torch.device) -> None:
        """Moves the window of losses to the device that trains."""
        self._recent, self._counted = self._recent.to(device, widest_float(device)), self._counted.to(device)

    def verdict(self, loss: Tensor, norm: Tensor) -> Tensor:
        """Returns whether to skip the step, as a tensor on the device.

        Args:
            loss, norm: loss of the step and norm of its gradient, over all ranks.
        """
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

    # --- on the host --------------------------------------------------------------------------------------------------

    def take(self, step: int) -> int | None:
        """Begins to copy the decision about a step to the host.

        Returns:
            How many decisions `read` should leave unread so that it does not wait for the device; None if there is no
            new decision.
        """
        if self._latest is None:
            return None
        latest, self._latest = self._latest, None
        event = None
        if latest.is_cuda:
            latest = latest.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._unread.append((step, latest, event))
        return 0 if event is None else 1

    def read(self, all_but: int = 0) -> Iterator[BadStep]:
        """Reads the decisions that were not read yet, and yields the skipped steps. All ranks read equal decisions.

        Args:
            all_but: how many of the newest decisions stay unread.
        """
        while len(self._unread) > all_but:
            step, values, event = self._unread.popleft()
            if event is not None:
                event.synchronize()
            skip, spike, loss, norm = values.tolist()
            self.in_a_row = self.in_a_row + 1 if skip else 0
            self.skipped += bool(skip)
            if skip:
                yield BadStep(step, "spike" if spike else _not_finite(loss), loss, norm)

    def forget_unread(self) -> None:
        """Discards the decisions that were not read, because the run stops."""
        self._unread.clear()

    def state(self) -> dict[str, Any]:
        """Returns the state for a checkpoint."""
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "recent": self._recent.cpu(),
            "counted": self._counted.cpu(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Restores the state from a checkpoint; the window of losses only if its length is unchanged."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        if len(state["recent"]) == self.spike_window:
            self._recent, self._counted = state["recent"].clone(), state["counted"].clone()


def _not_finite(loss: float) -> str:
    return "loss is not finite" if not math.isfinite(loss) else "gradient is not finite"


# --- the record -------------------------------------------------------------------------------------------------------


def append_record(path: Path, bad: BadStep, samples: Sequence[dict[str, Any]]) -> None:
    """Adds a skipped step and its samples to the file, as one line of JSON."""
    record = {
        "step": bad.step,
        "cause": bad.cause,
        "loss": _json_number(bad.loss),
        "gradient_norm": _json_number(bad.gradient_norm),
        "samples": list(samples),
    }
    append_line(path, json.dumps(record, ensure_ascii=False))


def drop_later_records(path: Path, step: int) -> None:
    """Removes the records after `step` from the file: a resumed run repeats these steps and records them again."""
    if path.exists():
        kept = [record for record in read_json_lines(path) if record.get("step", 0) <= step]
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def too_many_bad_steps(in_a_row: int, step: int, run: Path | None) -> TrainingStopped:
    """Returns the error that ends a run after too many bad steps.

    Args:
        run: the run's directory; None on ranks other than zero, which do not know the directory.
    """
    skipped = counted(in_a_row, "optimizer step in a row was", "optimizer steps in a row were")
    what = f"{skipped} skipped, up to step {step}"
    if run is None:
        return TrainingStopped(what)
    good = newest_checkpoint(run)
    where = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
    return TrainingStopped(f"{what} ({run / 'skipped.jsonl'} names their samples): {where}")


def _json_number(value: float) -> float | str:
    """Returns the number, or a string for nan and infinity, which JSON cannot represent."""
    return value if math.isfinite(value) else str(value)
