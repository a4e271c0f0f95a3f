"""Where the time of a training step goes."""

from __future__ import annotations

import math

from lightning.pytorch.profilers import SimpleProfiler

from lightning_danube.terminal import text_table
from lightning_danube.training.task import FORWARD


class StepTimes(SimpleProfiler):
    """`--trainer.profiler lightning_danube.callbacks.StepTimes`: a table of a step's parts at the end of `fit`.

    Times are of the host's clock. A GPU works behind it: there the parts that wait for it get its time, and
    `--trainer.profiler pytorch` says more.
    """

    def parts(self) -> dict[str, float]:
        """Seconds of each part over all training steps; "rest" is what Lightning's loop does around them."""
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
            # All of these are called from within the optimizer's step.
            "optimizer": max(0.0, step - training_step - backward - clip - hooks),
            "callbacks": hooks + math.fsum(map(self._seconds, around)),
            "logging": self._seconds("[LightningModule].on_train_batch_end"),
            "rest": max(0.0, batch - max(step, training_step + backward + hooks + zeroing)),
        }

    def steps(self) -> int:
        """Micro-batches that were trained on."""
        return len(self.recorded_durations.get("run_training_batch", ()))

    def _seconds(self, action: str) -> float:
        """Of the actions "[kind]Class.hook" of any class that are asked for as "[kind].hook"."""
        start, _, end = action.rpartition(".")
        return math.fsum(
            math.fsum(durations)
            for name, durations in self.recorded_durations.items()
            if name == action or ("." in action and name.startswith(start) and name.endswith(f".{end}"))
        )

    def describe(self) -> None:
        # Lightning would log it, with a prefix that tears the table.
        if self._local_rank in (None, 0):
            print(self.summary(), flush=True)

    def summary(self) -> str:
        steps, parts = self.steps(), self.parts()
        whole = sum(parts.values())
        if not steps:
            return ""
        rows = [
            [name, f"{1e3 * seconds / steps:.2f}", f"{100 * seconds / whole:.1f} %"] for name, seconds in parts.items()
        ]
        rows.append(["whole step", f"{1e3 * whole / steps:.2f}", "100 %"])
        return text_table([f"where {steps} steps' time went", "ms", "share"], rows)
