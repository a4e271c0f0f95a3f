"""Where the loggers of a run write: into the run's directory, and into one store of all runs."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger

from lightning_danube.extras import need
from lightning_danube.files import read_json, write_json, write_text
from lightning_danube.training.trackers.kept import kept

IN_RUN = ("CSVLogger", "TensorBoardLogger")
"""Loggers that write files of a run: into `<save_dir>/<name>/<version>`."""
EXTRAS = {"MLFlowLogger": "mlflow", "WandbLogger": "wandb"}
"""Logger → the extra that installs its package."""
RECORD = "trackers.json"
"""File in a run's directory: the ids under which trackers keep the run, so that a resume adds to the same curves."""
_UNSET = (None, "", "lightning_logs", "./mlruns", ".")
"""Defaults of Lightning's loggers for names and directories."""


class LoggerPlace(NamedTuple):
    """What the loggers of a run are told about it.

    Args:
        run: `<runs>/<name>/version_<n>`.
        resumed_at: the step of the checkpoint that the run continues from in its own directory; None for a new run.
    """

    run: Path
    resumed_at: int | None = None

    @property
    def runs(self) -> Path:
        return self.run.parent.parent


def make_logger(kind: type[Logger], given: Mapping[str, Any], place: LoggerPlace) -> Logger:
    """Returns a logger of a run, which cannot stop the run.

    Args:
        given: the options that the user set, and Lightning's defaults.

    Raises:
        ValueError: the logger's package is not installed, or an option is wrong.
    """
    if kind.__name__ in EXTRAS:
        need(EXTRAS[kind.__name__], kind.__name__)
    try:
        logger = kept(kind(**options_of_logger(kind.__name__, given, place)))
    except Exception as error:
        raise ValueError(f"trainer.logger: {kind.__name__}: {str(error).splitlines()[0]}") from error
    if isinstance(logger, CSVLogger) and place.resumed_at is not None:
        keep_rows(logger, place.resumed_at)
    return logger


def options_of_logger(name: str, given: Mapping[str, Any], place: LoggerPlace) -> dict[str, Any]:
    """Returns the options of a logger. Those that the user did not set follow from the run.

    Args:
        name: the logger's class.
    """
    run = place.run
    follows: dict[str, Any] = {}
    if name in IN_RUN:
        in_run = _same(given.get("save_dir"), place.runs) and given.get("version") is None
        if in_run and given.get("name") in _UNSET:
            follows = {"save_dir": str(place.runs), "name": run.parent.name, "version": run.name}
        return {**given, **follows}
    if name == "MLFlowLogger":
        # MLflow would ask a server that does not answer for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        follows = {"experiment_name": run.parent.name, "run_name": run.name, "run_id": known_id(name, place)}
        # The default of `tracking_uri` is MLFLOW_TRACKING_URI as the process began. MLflow sets that variable later.
        if given.get("save_dir") in _UNSET and given.get("tracking_uri") in _UNSET:
            follows["tracking_uri"] = f"sqlite:///{(place.runs / 'mlflow.db').absolute()}"
            follows["artifact_location"] = str((place.runs / "mlflow-artifacts").absolute())
    elif name == "WandbLogger":
        follows = {"name": run.name, "save_dir": str(run), "id": known_id(name, place)}
        if not os.environ.get("WANDB_PROJECT"):
            follows["project"] = run.parent.name
    return {**given, **{key: value for key, value in follows.items() if given.get(key) in _UNSET}}


def _same(save_dir: Any, runs: Path) -> bool:
    return save_dir is not None and Path(save_dir).absolute() == runs.absolute()


def known_id(name: str, place: LoggerPlace) -> str | None:
    """Returns the id under which a tracker keeps the run that is resumed; None for a new run."""
    if place.resumed_at is None:
        return None
    try:
        known: dict[str, str] = read_json(place.run / RECORD)
    except (OSError, ValueError):
        return None
    return known.get(name)


def record_ids(run: Path, loggers: Iterable[Logger]) -> None:
    """Writes the ids under which trackers keep this run, if it has any."""
    ids = {}
    for logger in loggers:
        if isinstance(logger, MLFlowLogger):
            ids["MLFlowLogger"] = logger.run_id
        elif isinstance(logger, WandbLogger):
            ids["WandbLogger"] = logger.version
    if any(ids.values()):
        write_json(run / RECORD, ids)


def keep_rows(logger: CSVLogger, resumed_at: int) -> None:
    """Opens the table of a resumed run, and keeps its rows up to the checkpoint's step.

    Lightning's logger removes the table that it finds.
    """
    file = Path(logger.log_dir) / "metrics.csv"
    if not file.is_file():
        return
    text = file.read_text("utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    fields: Sequence[str] = list(rows[0]) if rows else []
    writer = logger.experiment
    if fields:
        kept = [row for row in rows if int(row["step"] or 0) <= resumed_at]
        lines = [",".join(fields), *(",".join(row[field] or "" for field in fields) for row in kept)]
        write_text(file, "\n".join(lines) + "\n")
        writer.metrics_keys = list(fields)
