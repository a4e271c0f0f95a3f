"""What every run tells its loggers: settings, tokens of a step, and how TensorBoard arranges the curves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch.utils.tensorboard.summary import hparams

from lightning_danube.training.position import tokens_done
from lightning_danube.training.trackers import STEPS
from lightning_danube.training.trackers.kept import KeptLogger, count_tokens

CHARTS = {
    "loss": {
        "training": ["loss/train$"],
        "held-out text of each source": ["held_out/.*"],
        "held-out text of each source, all rows": ["loss/held_out_.*"],
    },
    "step": {
        "learning rate": ["optimizer/learning_rate$"],
        "gradient norm, before clipping": ["optimizer/gradient_norm$"],
    },
    "speed": {
        "tokens a second": ["throughput/tokens_per_second$"],
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

    The row has the last value of each metric, so it is right while the run goes on.
    """

    def __init__(self) -> None:
        self._in_table = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        count_tokens(trainer.loggers, getattr(data, "batch_tokens", 0) if stage == "fit" else 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in kept_tensorboards(trainer.loggers):
            if trainer.global_step:
                drop_from(logger, tokens_done(trainer) + 1)
            logger.experiment.add_custom_scalars({group: _multiline(charts) for group, charts in CHARTS.items()})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._write_row(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write_row(trainer)

    def _write_row(self, trainer: Trainer) -> None:
        """Writes the row once, when the names of the metrics are known: after the first validation."""
        if self._in_table or trainer.sanity_checking:
            return
        self._in_table = True
        names = [*trainer.callback_metrics, "throughput/tokens_per_second"]
        for logger in kept_tensorboards(trainer.loggers):
            if logger.settings:
                for part in hparams(dict(logger.settings), dict.fromkeys(names, 0.0)):
                    logger.experiment.file_writer.add_summary(part)


def _multiline(charts: Mapping[str, list[str]]) -> dict[str, list[Any]]:
    return {title: ["Multiline", tags] for title, tags in charts.items()}


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


def logged_settings(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the settings of data, model and trainer that are numbers, texts or switches, by their key on the command
    line without `init_args`."""
    sections = {key: config[key] for key in ("seed_everything", "data", "model") if key in config}
    trainer = {key: value for key, value in (config.get("trainer") or {}).items() if key != "default_root_dir"}
    yield from _scalars({**sections, "trainer": trainer}, ())


def _scalars(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _scalars(inner, path if key == "init_args" else (*path, str(key)))
    elif isinstance(value, list):
        # Stages are named; callbacks and other lists of classes are no settings to compare.
        for inner in value:
            if isinstance(inner, Mapping) and "name" in inner:
                rest = {key: one for key, one in inner.items() if key != "name"}
                yield from _scalars(rest, (*path, str(inner["name"])))
    elif isinstance(value, str | int | float | bool):
        yield ".".join(path), value
