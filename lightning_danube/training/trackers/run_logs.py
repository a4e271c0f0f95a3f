"""What every run tells its loggers: settings, tokens of a step, and how TensorBoard arranges the curves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard.summary import hparams

from lightning_danube.training.position import tokens_done
from lightning_danube.training.trackers import STEPS
from lightning_danube.training.trackers.kept import KeptLogger, count_tokens

ALL_ROWS = "held-out text of each source, all rows"
"""A chart whose values come later than the first ones."""
CHARTS = {
    "loss": {
        "training": ["loss/train$"],
        "held-out text of each source": ["held_out/.*"],
        ALL_ROWS: ["loss/held_out_.*"],
    },
    "step": {
        "learning rate": ["optimizer/learning_rate$"],
        "gradient norm, before clipping": ["optimizer/gradient_norm$"],
    },
    "speed": {
        "tokens/s": ["throughput/tokens_per_second$"],
        "share of the device's peak (MFU)": ["throughput/mfu$"],
        "optimizer steps": [f"{STEPS}$"],
    },
    "data": {
        "share of each source in the tokens": ["mix/(?!stage).*"],
        "stage": ["mix/stage$"],
    },
}
"""TensorBoard's tab "Custom scalars": group → chart → patterns of tags."""


class RunLogs(Callback):
    """Arranges TensorBoard's charts, and writes the run's row in its table of hyper-parameters.

    Both are written once, after the first validation: then the names of the values are known. The row has the last
    value of each metric, so it is right during the run.
    """

    def __init__(self) -> None:
        self._is_arranged = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        count_tokens(trainer.loggers, getattr(data, "batch_tokens", 0) if stage == "fit" else 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in kept_tensorboards(trainer.loggers):
            if trainer.global_step:
                drop_from(logger, tokens_done(trainer) + 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._arrange(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._arrange(trainer)

    def _arrange(self, trainer: Trainer) -> None:
        if self._is_arranged:
            return
        self._is_arranged = True
        for logger in kept_tensorboards(trainer.loggers):
            logger.experiment.add_custom_scalars(charts_of(logger.logged))
            if logger.settings:
                for part in hparams(dict(logger.settings), dict.fromkeys(metrics_of(logger.logged), 0.0)):
                    logger.experiment.file_writer.add_summary(part)


def charts_of(logged: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """Returns TensorBoard's charts, without those that would be empty."""
    names = list(logged)
    found = {
        group: {
            title: ["Multiline", patterns]
            for title, patterns in charts.items()
            if title == ALL_ROWS or any(re.match(pattern, name) for pattern in patterns for name in names)
        }
        for group, charts in CHARTS.items()
    }
    return {group: charts for group, charts in found.items() if charts}


def metrics_of(logged: Iterable[str]) -> list[str]:
    """Returns the metrics of a run's row: its losses and scores, and its speed.

    The losses of all held-out rows come later than the first ones of a few rows.
    """
    names = sorted(
        name for name in logged if not name.startswith(("optimizer/", "mix/", "tokens_seen/", "throughput/"))
    )
    later = [f"loss/held_out_{name.removeprefix('held_out/')}" for name in names if name.startswith("held_out/")]
    return list(dict.fromkeys([*later, *names, "throughput/tokens_per_second"]))


def kept_tensorboards(loggers: Iterable[Logger]) -> Iterator[Any]:
    """Yields the run's loggers to TensorBoard that work."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger) and isinstance(logger, KeptLogger) and not logger.failed:
            yield logger


def drop_from(logger: TensorBoardLogger, step: int) -> None:
    """Makes TensorBoard drop what an earlier session logged from a step on: the resumed run logs it again."""
    session = SessionLog(status=SessionLog.START)
    logger.experiment.file_writer.add_event(Event(step=step, session_log=session))


def log_settings(loggers: Iterable[Logger], config: Mapping[str, Any], *, resumed: bool) -> None:
    """Tells the loggers of a run its settings. MLflow refuses new ones for a run that has begun."""
    settings = dict(logged_settings(config))
    for logger in loggers:
        if isinstance(logger, KeptLogger) and isinstance(logger, TensorBoardLogger):
            logger.settings = settings
        elif not (resumed and isinstance(logger, MLFlowLogger)):
            logger.log_hyperparams(settings)


NO_SETTINGS = ("sources", "train", "validation", "test", "predict", "cache_dir", "processes", "workers")
"""Options of data that say where the data are and who reads them, not what is trained."""
SETTINGS_OF_TRAINER = ("precision", "gradient_clip_val", "max_steps", "strategy", "devices", "num_nodes")


def logged_settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the settings of data, model and trainer that are numbers, texts or switches, by their key on the command
    line without `init_args`."""
    sections = {key: config[key] for key in ("seed_everything", "model") if key in config}
    given = (config.get("data") or {}).get("init_args") or {}
    data = {key: value for key, value in given.items() if key not in NO_SETTINGS}
    trainer = {key: value for key, value in (config.get("trainer") or {}).items() if key in SETTINGS_OF_TRAINER}
    yield from _scalars({**sections, "data": data, "trainer": trainer}, ())


def _scalars(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _scalars(inner, path if key == "init_args" else (*path, str(key)))
    elif isinstance(value, list):
        # Stages are named; callbacks and other lists of classes are not settings to compare.
        for inner in value:
            if isinstance(inner, Mapping) and "name" in inner:
                rest = {key: one for key, one in inner.items() if key != "name"}
                yield from _scalars(rest, (*path, str(inner["name"])))
    elif isinstance(value, str | int | float | bool):
        yield ".".join(path), value
