"""Where the loggers of a run write, and what a resumed run finds."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_danube.training.trackers import places
from lightning_danube.training.trackers.kept import KeptLogger
from lightning_danube.training.trackers.places import LoggerPlace, make_logger, options_of_logger

UNSET_MLFLOW = {"experiment_name": "lightning_logs", "run_name": None, "tracking_uri": None, "save_dir": "./mlruns"}
UNSET_WANDB = {"name": None, "save_dir": ".", "project": None, "id": None, "offline": True}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoggerPlace:
    for variable in ("MLFLOW_TRACKING_URI", "WANDB_PROJECT"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(variable, "1")
    run = tmp_path / "runs" / "tiny" / "version_3"
    run.mkdir(parents=True)
    return LoggerPlace(run)


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_files_go_into_the_runs_directory(kind: Any, place: LoggerPlace) -> None:
    logger: Any = make_logger(kind, {"save_dir": str(place.runs), "name": "lightning_logs", "version": None}, place)
    assert logger.log_dir == str(place.run) and isinstance(logger, KeptLogger)


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize("own", [{"save_dir": "logs"}, {"name": "mine"}, {"version": 7}])
def test_what_the_user_sets_stays(kind: Any, own: dict[str, Any], place: LoggerPlace) -> None:
    given = {"save_dir": str(place.runs), "name": "lightning_logs", "version": None, **own}
    assert options_of_logger(kind.__name__, given, place) == given


def test_mlflow_has_one_local_store_of_all_runs(place: LoggerPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of_logger("MLFlowLogger", UNSET_MLFLOW, place)
    assert options["tracking_uri"] == f"sqlite:///{place.runs / 'mlflow.db'}"
    assert (options["experiment_name"], options["run_name"], options["run_id"]) == ("tiny", "version_3", None)
    own = options_of_logger("MLFlowLogger", {**UNSET_MLFLOW, "tracking_uri": "http://here", "run_name": "mine"}, place)
    assert (own["tracking_uri"], own["run_name"]) == ("http://here", "mine")
    assert "artifact_location" not in own, "a server has a place of its own"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///of-the-run-before")
    assert options_of_logger("MLFlowLogger", UNSET_MLFLOW, place)["tracking_uri"] == options["tracking_uri"]


def test_weights_and_biases_writes_into_the_runs_directory(place: LoggerPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of_logger("WandbLogger", UNSET_WANDB, place)
    assert (options["project"], options["name"], options["save_dir"]) == ("tiny", "version_3", str(place.run))
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    assert options_of_logger("WandbLogger", UNSET_WANDB, place)["project"] is None, "Lightning reads the variable"


@pytest.mark.parametrize(("name", "key"), [("MLFlowLogger", "run_id"), ("WandbLogger", "id")])
def test_a_resumed_run_goes_on_under_its_id(name: str, key: str, place: LoggerPlace) -> None:
    given = UNSET_MLFLOW if name == "MLFlowLogger" else UNSET_WANDB
    resumed = place._replace(resumed_at=12)
    assert options_of_logger(name, given, resumed)[key] is None, "nothing was recorded"
    (place.run / "trackers.json").write_text(json.dumps({"MLFlowLogger": "abc", "WandbLogger": "abc"}))
    assert options_of_logger(name, given, resumed)[key] == "abc"
    assert options_of_logger(name, given, place)[key] is None, "another run"


def test_ids_are_recorded_if_there_are_any(place: LoggerPlace) -> None:
    wandb = object.__new__(WandbLogger)
    wandb._experiment, wandb._id = None, None
    places.record_ids(place.run, [wandb, DummyLogger()])
    assert not (place.run / "trackers.json").exists()
    wandb._id = "xyz"
    places.record_ids(place.run, [wandb])
    assert json.loads((place.run / "trackers.json").read_text()) == {"WandbLogger": "xyz"}


def test_a_resumed_table_keeps_its_rows_up_to_the_checkpoint(
    place: LoggerPlace, recwarn: pytest.WarningsRecorder
) -> None:
    given = {"save_dir": str(place.runs)}
    for resumed_at, steps in ((None, (0, 10, 20, 30)), (20, (30, 40))):
        logger = make_logger(CSVLogger, given, place._replace(resumed_at=resumed_at))
        for step in steps:
            logger.log_metrics({"loss": 100.0 - step, **({"new": 1.0} if step == 40 else {})}, step)
        logger.finalize("success")
    rows = list(csv.DictReader((place.run / "metrics.csv").open()))
    assert [(row["step"], row["loss"]) for row in rows] == [
        ("0", "100.0"), ("10", "90.0"), ("20", "80.0"), ("30", "70.0"), ("40", "60.0")
    ]  # fmt: skip
    assert [row["new"] for row in rows] == ["", "", "", "", "1.0"]


def test_a_logger_that_is_not_installed_says_how_to_install_it(
    place: LoggerPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(extra: str) -> str:
        return {"mlflow": "mlflow", "wandb": "wandb"}[extra]

    monkeypatch.setattr("lightning_danube.extras.missing_module", missing)
    with pytest.raises(ValueError, match=r"MLFlowLogger needs mlflow, which is not installed; type: .*\[mlflow\]"):
        make_logger(MLFlowLogger, UNSET_MLFLOW, place)
    with pytest.raises(ValueError, match=r"WandbLogger needs wandb, which is not installed; type: .*\[wandb\]"):
        make_logger(WandbLogger, UNSET_WANDB, place)


def test_a_wrong_option_of_a_logger_is_one_line(place: LoggerPlace) -> None:
    with pytest.raises(ValueError, match=r"^trainer\.logger: CSVLogger: .*flush"):
        make_logger(CSVLogger, {"save_dir": str(place.runs), "flush_every": 1}, place)
