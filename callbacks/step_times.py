"""Measures where the time of a training step goes."""

from __future__ import annotations

import math

from lightning.pytorch.profilers import SimpleProfiler

from lightning_danube.terminal import show, text_table
from lightning_danube.training.task import FORWARD


class StepTimes(SimpleProfiler):
    """Prints a table of the parts of a training step at the end of `fit`.

    Use it with `--trainer.profiler lightning_danube.callbacks.StepTimes`. The times are the host's. A GPU works later
    than the host: its time counts for the part that waits for the GPU, and `--trainer.profiler pytorch` says more.
    """

    def parts(self) -> dict[str, float]:
        """Returns the seconds of each part over all training steps; "rest" is the time of Lightning's loop."""
        around = [f"[Callback].{hook}" for hook in ("on_train_batch_start", "on_train_batch_end")]
        inside = [
            f"[{kind}].{hook}"
            for kind in ("Callback", "LightningModule")
            for hook in ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
        ]
        training_step, backward = self._seconds("[Strategy].training_step"), self._seconds("[Strategy].backward")
        forward, clip = self._seconds(FORWARD), self._seconds("[LightningModule].configure_gradient_clipping")
        zeroing = self._seconds("[LightningModule].optimizer_zero_grad")
        hooks = math.fsum(map(self._seconds, inside))
        batch, step = self._seconds("run_training_batch"), self._seconds("[LightningModule].optimizer_step")
        return {
            "data": self._seconds(".train_dataloader_next") + self._seconds("[Strategy].batch_to_device"),
            "forward": forward,
            "loss": training_step - forward,
            "backward": backward,
            "clip": clip,
            # The optimizer's step calls all parts that are subtracted here.
            "optimizer": max(0.0, step - training_step - backward - clip - hooks),
            "callbacks": hooks + math.fsum(map(self._seconds, around)),
            "logging": self._seconds("[LightningModule].on_train_batch_end"),
            "rest": max(0.0, batch - max(step, training_step + backward + hooks + zeroing)),
        }

    def steps(self) -> int:
        """Returns the number of micro-batches that were trained on."""
        return len(self.recorded_durations.get("run_training_batch", ()))

    def _seconds(self, action: str) -> float:
        """Returns the seconds of an action; "[kind].hook" stands for the actions "[kind]Class.hook" of all classes."""
        start, _, end = action.rpartition(".")
        return math.fsum(
            math.fsum(durations)
            for name, durations in self.recorded_durations.items()
            if name == action or ("." in action and name.startswith(start) and name.endswith(f".{end}"))
        )

    def describe(self) -> None:
        # Lightning would log the table with a prefix that breaks its columns.
        if self._local_rank in (None, 0):
            show(self.summary())

    def summary(self) -> str:
        """Returns the table; an empty text if nothing was trained."""
        steps, parts = self.steps(), self.parts()
        whole = sum(parts.values())
        if not steps:
            return ""
        rows = [
            [name, f"{1e3 * seconds / steps:.2f}", f"{100 * seconds / whole:.1f} %"] for name, seconds in parts.items()
        ]
        rows.append(["whole step", f"{1e3 * whole / steps:.2f}", "100 %"])
        return text_table([f"where {steps} steps' time went", "ms", "share"], rows)
