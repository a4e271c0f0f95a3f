"""Logs the tokens/s of training, and their share of the hardware's peak."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_danube.training.planned_data import tokens_of_steps
from lightning_danube.training.position import at_logged_step, training_data_of
from lightning_danube.training.run_facts import run_facts_of
from lightning_danube.training.task import DecoderTask


class Throughput(Callback):
    """Logs `throughput/tokens_per_second` and, if the peak is given, `throughput/mfu` (model FLOPs utilisation).

    Padding does not count, and a token has the FLOPs of a token in a whole context. Time spent in validation, samples
    and checkpoints does not count. The first interval after a start is not logged, because it includes compilation and
    warm-up.

    Args:
        peak_flops: dense peak of one device in FLOP/s at the precision used, for example 989e12 for bf16 on H100 and
            H200. A vendor's figure "with sparsity" is twice the dense peak.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"peak_flops is {peak_flops}: give the device's dense peak in FLOP/s, such as 989e12")
        self.peak_flops = peak_flops
        self.seconds = 0.0
        """Seconds spent in training steps, over all sessions of the run."""
        self._interval: tuple[float, int] | None = None
        self._since: float | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        run_facts_of(pl_module).training_seconds = self.seconds

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._since is None:  # the first batch, or the first after validation
            self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.monotonic()
        assert self._since is not None
        self.seconds += now - self._since
        self._since = now
        run_facts_of(pl_module).training_seconds = self.seconds
        if at_logged_step(trainer, batch_idx):
            self._log(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = None

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = training_data_of(trainer)
        if self._interval is not None and trainer.global_step > self._interval[1]:
            seconds, step = self._interval
            rate = tokens_of_steps(data, step, trainer.global_step) / (self.seconds - seconds)
            values = {"throughput/tokens_per_second": rate}
            if self.peak_flops is not None:
                assert isinstance(pl_module, DecoderTask)
                flops = pl_module.config.flops_per_token(data.context_length)
                values["throughput/mfu"] = rate * float(flops) / (self.peak_flops * trainer.world_size)
            for logger in trainer.loggers:
                logger.log_metrics(values, step=trainer.global_step)
        self._interval = (self.seconds, trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = state_dict["seconds"]
