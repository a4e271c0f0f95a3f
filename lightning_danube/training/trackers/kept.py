"""A logger that cannot stop a run: a failure costs one line. It counts tokens as well as optimizer steps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_danube.terminal import tell
from lightning_danube.training.trackers import STEPS, TOKENS

_PREFIX = "_Kept"


class KeptLogger(Logger):
    """The base of a logger that `kept` has changed.

    TensorBoard shows all curves over the training tokens, so that runs with different batches can be compared, and
    has the optimizer steps as a curve. The other loggers count optimizer steps, and log the tokens beside each value.
    They get the values of one step together: one row of a table, and one request to a server.
    """

    settings: Mapping[str, Any] = MappingProxyType({})
    """The run's settings, for TensorBoard's table of runs."""
    tokens_per_step = 0
    """Training tokens of an optimizer step; 0 where nothing is trained."""
    logged: frozenset[str] = frozenset()
    """The names of all values so far."""
    failed = False
    """Whether a call has failed. No call is tried again in this session."""
    _pending: tuple[int, dict[str, float]] | None = None
    _counted: int | None = None

    @property
    def experiment(self) -> Any:
        found = self._try(lambda: super(KeptLogger, self).experiment)  # type: ignore[misc]
        if self.failed:
            return DummyLogger().experiment
        return KeptWriter(self, found) if isinstance(self, TensorBoardLogger) else found

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is None:
            self._try(lambda: super(KeptLogger, self).log_metrics(dict(metrics), step))  # type: ignore[safe-super]
        elif isinstance(self, TensorBoardLogger):
            self._send(step, metrics)
        else:
            if self._pending is not None and self._pending[0] != step:
                self._flush()
            self._pending = step, {**(self._pending[1] if self._pending else {}), **metrics}

    def _flush(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            self._send(*pending)

    def _send(self, step: int, metrics: Mapping[str, float]) -> None:
        values, place = dict(metrics), step
        if self.tokens_per_step:
            tokens = step * self.tokens_per_step
            if not isinstance(self, TensorBoardLogger):
                values[TOKENS] = float(tokens)
            else:
                place = tokens
                if step != self._counted:
                    values[STEPS] = float(step)
            self._counted = step
        self.logged |= values.keys()
        self._try(lambda: super(KeptLogger, self).log_metrics(values, place))  # type: ignore[safe-super]
        if isinstance(self, CSVLogger):  # so that the table can be read during the run
            self._try(lambda: super(KeptLogger, self).save())

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._try(lambda: super(KeptLogger, self).log_hyperparams(params, *args, **kwargs))  # type: ignore[safe-super]

    def save(self) -> None:
        self._flush()
        self._try(lambda: super(KeptLogger, self).save())

    def finalize(self, status: str) -> None:
        self._flush()
        self._try(lambda: super(KeptLogger, self).finalize(status))

    def _try(self, call: Callable[[], Any]) -> Any:
        """Calls unless a call has failed before. The first failure prints one line."""
        if self.failed:
            return None
        try:
            return call()
        except Exception as error:
            self.failed = True
            lines = str(error).strip().splitlines() or [type(error).__name__]
            what = lines[0] if len(lines[0]) <= 160 else f"{lines[0][:160]}…"
            name = type(self).__name__.removeprefix(_PREFIX)
            tell(f"warning: {name} logs nothing more in this session, and the run continues: {what}")
            return None


class KeptWriter:
    """A writer of TensorBoard events, or its file writer. Callbacks call it, and a failure costs one line here too.

    A thread writes the events. So a full disk fails a later call than the one whose events it refused.
    """

    def __init__(self, logger: KeptLogger, writer: Any) -> None:
        self._logger, self._writer = logger, writer

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._writer, name)
        if name == "file_writer":
            return KeptWriter(self._logger, found)
        return (lambda *args, **kwargs: self._logger._try(lambda: found(*args, **kwargs))) if callable(found) else found


def kept(logger: Logger) -> Logger:
    """Returns the logger, changed in place to a `KeptLogger` that is still a logger of its own class."""
    if isinstance(logger, TensorBoardLogger):
        _leave_errors_to_calls()
    if not isinstance(logger, KeptLogger):
        logger.__class__ = _kept_class(type(logger))
    return logger


@cache
def _kept_class(kind: type[Logger]) -> type[Logger]:
    # With the underscore, the parser of configurations does not offer the class beside the one that it is made from.
    return type(f"{_PREFIX}{kind.__name__}", (KeptLogger, kind), {"__module__": __name__, "__doc__": kind.__doc__})


@cache
def _leave_errors_to_calls() -> None:
    """Prints no traceback of TensorBoard's thread: its next call raises the same error, and `KeptLogger` tells it."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            before(args)

    threading.excepthook = hook


def count_tokens(loggers: list[Logger], tokens_per_step: int) -> None:
    """Tells the loggers of a run how many tokens its optimizer steps have."""
    for logger in loggers:
        if isinstance(logger, KeptLogger):
            logger.tokens_per_step = tokens_per_step


def end_of_session(loggers: list[Logger], failed: bool) -> None:
    """Ends the run of Weights & Biases, which otherwise lasts as long as the process, and takes the next run's values.

    Lightning has finalized the other loggers.
    """
    if any(isinstance(logger, WandbLogger) for logger in loggers):
        import wandb

        if wandb.run is not None:
            wandb.finish(exit_code=int(failed))
