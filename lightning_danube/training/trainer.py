"""The trainer settings that the recipe needs, and a function that makes such a trainer in Python."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from lightning_danube.checkpoints.single import DurableCheckpointIO
from lightning_danube.checkpoints.strategy import ShardedStrategy
from lightning_danube.device import exact_products_by_onednn
from lightning_danube.training.position import RunTrainer
from lightning_danube.training.precision import choose, kind_of_device
from lightning_danube.training.trackers.kept import kept
from lightning_danube.training.trackers.loss_curve import HeldOutCurve
from lightning_danube.training.trackers.run_logs import RunLogs

TRAINER_DEFAULTS: dict[str, Any] = {
    # The curriculum is one epoch over one sampler. The stages determine its length and the times of validation.
    "max_epochs": 1,
    "num_sanity_val_steps": 0,
    "use_distributed_sampler": False,
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    "enable_model_summary": False,
}


def own_strategy(strategy: Any, kind: str, devices: Any = "auto", nodes: int = 1) -> Any:
    """Returns our strategy in place of Lightning's ModelParallelStrategy, and any other strategy as it is.

    On one device there is nothing to share, so a strategy that shards becomes "auto": a configuration for a cluster
    then trains there as one without a strategy does.

    Args:
        kind: kind of device, as from `kind_of_device`.
        devices, nodes: the trainer's `devices` and `num_nodes`.
    """
    if isinstance(strategy, ModelParallelStrategy) and nodes * device_count(kind, devices) == 1:
        return "auto"
    return ShardedStrategy.like(strategy) if type(strategy) is ModelParallelStrategy else strategy


def device_count(kind: str, devices: Any) -> int:
    """Returns how many devices the trainer's option `devices` stands for on this machine."""
    if devices in ("auto", -1, "-1"):
        return torch.cuda.device_count() if kind == "cuda" else 1
    if isinstance(devices, str):
        named = devices.strip(", ").split(",")
        return len(named) if "," in devices else int(devices) if devices.isdigit() else 0  # Lightning refuses others
    return devices if isinstance(devices, int) else len(devices)


def share_buckets(strategy: Strategy) -> None:
    """Makes DDP keep the gradients inside its communication buckets, instead of in a second copy.

    `static_graph` stays off: every weight has a gradient in every step, so it would change nothing.
    """
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs.setdefault("gradient_as_bucket_view", True)


class FastProducts(Callback):
    """Lets oneDNN multiply matrices on a CPU while a trainer runs. See `device.py`."""

    def __init__(self) -> None:
        self._open = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.strategy.root_device.type == "cpu":
            self._open.enter_context(exact_products_by_onednn())

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._open.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._open.close()


def make_trainer(
    name: str = "run", *, runs: str | Path = "runs", callbacks: Sequence[Callback] = (), **options: Any
) -> Trainer:
    """Returns a Lightning trainer with the settings of `fit` on the command line.

    It clips gradients at 1, makes checkpoints durable, and leaves the order of samples to the data module. It uses the
    fastest exact enough precision of this machine. The run's files and TensorBoard events go into
    `<runs>/<name>/version_<n>`, also with another `logger`.

    Args:
        callbacks: hooks of the run. Only `lightning_danube.callbacks.Checkpoints()` writes checkpoints.
        options: options of `lightning.pytorch.Trainer`; they override the defaults.
    """
    place = TensorBoardLogger(str(runs), name=name)
    loggers = options.pop("logger", True)
    loggers = [place] if loggers is True else [loggers] if isinstance(loggers, Logger) else loggers or []
    kind = kind_of_device(options.get("accelerator", "auto"))
    given: dict[str, Any] = {
        **TRAINER_DEFAULTS,
        "logger": [kept(logger) for logger in loggers],
        "default_root_dir": place.log_dir,
        "plugins": [DurableCheckpointIO(background=kind != "cpu")],
        "precision": options.get("precision") or choose(kind).precision,
        # Without a callback that writes checkpoints, Lightning would add its own.
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        **options,
    }
    spread = given.get("devices", "auto"), given.get("num_nodes", 1)
    given["strategy"] = own_strategy(given.get("strategy", "auto"), kind, *spread)
    trainer = RunTrainer(callbacks=[*callbacks, FastProducts(), RunLogs(), HeldOutCurve()], **given)
    share_buckets(trainer.strategy)
    return trainer


def check_trainer(trainer: Trainer) -> None:
    """Refuses a trainer that would silently differ from the recipe.

    Raises:
        ValueError: gradients would not be clipped, weights would not be sharded, checkpoints would not be durable, or
            samples would be distributed twice.
    """
    way_out = "make the trainer with lightning_danube.make_trainer(…)"
    if type(trainer.strategy) is ModelParallelStrategy:
        raise ValueError(f"ModelParallelStrategy shards no weights here: {way_out}, or give it a ShardedStrategy")
    if trainer.gradient_clip_val is None:
        raise ValueError(f"the trainer clips no gradient: {way_out}, or set gradient_clip_val (0 for none)")
    if trainer.checkpoint_callbacks and type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        raise ValueError(
            f"the trainer's checkpoints are not durable: {way_out}, or pass plugins=[DurableCheckpointIO()], or "
            "enable_checkpointing=False"
        )
    if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
        raise ValueError(
            f"the trainer would deal the samples a second time: {way_out}, or use_distributed_sampler=False"
        )
