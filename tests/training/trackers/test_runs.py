"""Whole runs with each logger, with several and with none: what they leave is the same, also after a resume."""

import csv
import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_danube.__main__ import main

STEPS, STOP, STEP_TOKENS = 26, 14, 256
OFFLINE = "{class_path: WandbLogger, init_args: {offline: true}}"


def fit(tiny: Path, logger: str, *more: str) -> None:
    assert main(["fit", "--config", str(tiny / "tiny.yaml"), "--trainer.logger", logger, *more]) == 0


def stopped_and_resumed(tiny: Path, logger: str, capsys: pytest.CaptureFixture[str]) -> tuple[Path, str]:
    """A run that stops in its second stage, and goes on. Returns its directory and what it printed last."""
    fit(tiny, logger, "--trainer.max_steps", str(STOP))
    capsys.readouterr()
    fit(tiny, logger, "--ckpt_path", "last")
    return tiny / "runs" / "tiny" / "version_0", capsys.readouterr().out


def check_run(run: Path, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The directory, its checkpoints, its result and the next command do not depend on the logger."""
    assert [version.name for version in run.parent.iterdir()] == ["version_0"]
    assert {path.name for path in (run / "checkpoints").glob("*.ckpt")} == {
        "stage_1_foundation_step_00000012.ckpt",
        "stage_2_refinement_step_00000020.ckpt",
        "stage_3_finish_step_00000026.ckpt",
    }
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == STEPS and summary["tokens"] == STEPS * STEP_TOKENS
    assert len((run / "history.jsonl").read_text().splitlines()) == 2
    (following,) = [line for line in printed.splitlines() if line.startswith("next: ")]
    assert f" generate --weights {run} " in following
    assert main(["generate", "--weights", str(run), "--prompt", "The river", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("The river")


def check_curve(points: list[tuple[int, float]], resumed_twice: bool) -> None:
    """(step, tokens) of the training loss: all steps, those after the checkpoint of a stop once more if at all."""
    assert [step for step, _ in points] == list(range(1, STEPS + 1)) or resumed_twice
    assert all(tokens == step * STEP_TOKENS for step, tokens in points) and len(points) >= STEPS


@pytest.mark.medium
def test_a_run_with_a_table_and_with_tensorboard(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, printed = stopped_and_resumed(tiny, "[CSVLogger, TensorBoardLogger]", capsys)
    check_run(run, printed, capsys)
    assert "tensorboard --logdir" in printed
    rows = [row for row in csv.DictReader((run / "metrics.csv").open()) if row["loss/train"]]
    check_curve([(int(row["step"]), float(row["tokens"])) for row in rows], resumed_twice=False)
    assert rows[0]["held_out/web"] == "" and float(rows[-1]["held_out/web"]) > 0
    events = EventAccumulator(str(run)).Reload()
    assert [e.step for e in events.Scalars("loss/train")] == [step * STEP_TOKENS for step in range(1, STEPS + 1)]
    held_out = [e.step // STEP_TOKENS for e in events.Scalars("held_out/web")]
    assert held_out[0] == 0 and held_out[-1] == STEPS and len(held_out) > 10
    assert "mix/seen" in events.Tags()["images"]


@pytest.mark.medium
def test_a_run_without_a_logger(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, printed = stopped_and_resumed(tiny, "false", capsys)
    check_run(run, printed, capsys)
    assert "tensorboard" not in printed
    assert not [path for path in run.iterdir() if path.name.startswith("events") or path.name == "metrics.csv"]


@pytest.mark.trackers
def test_a_run_with_mlflow(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow.tracking import MlflowClient

    run, printed = stopped_and_resumed(tiny, "MLFlowLogger", capsys)
    check_run(run, printed, capsys)
    client = MlflowClient(f"sqlite:///{tiny / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    (kept,) = client.search_runs([experiment.experiment_id])
    assert (kept.info.run_name, kept.info.status) == ("version_0", "FINISHED")
    assert kept.data.params["data.batch_tokens"] == "256" and kept.data.params["seed_everything"] == "3"
    history = {name: client.get_metric_history(kept.info.run_id, name) for name in ("loss/train", "tokens")}
    tokens = {metric.step: metric.value for metric in history["tokens"]}
    check_curve([(metric.step, tokens[metric.step]) for metric in history["loss/train"]], resumed_twice=True)


@pytest.mark.trackers
def test_a_run_with_weights_and_biases_offline(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, printed = stopped_and_resumed(tiny, OFFLINE, capsys)
    check_run(run, printed, capsys)
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2 and len({file.stem for file in files}) == 1, "the resumed run adds to the same run"
    rows = [row for file in files for row in history_of(file.read_bytes()) if "loss/train" in row]
    check_curve([(int(row["trainer/global_step"]), float(row["tokens"])) for row in rows], resumed_twice=False)


def history_of(content: bytes) -> Iterator[dict[str, str]]:
    """Yields name → value of each row in a file of Weights & Biases: a log in the format of LevelDB."""
    record_type: Any = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    block, place, whole = 32768, 7, b""
    while place + 7 <= len(content):
        left = block - place % block
        if left < 7:  # the end of a block that is too short for the head of a record
            place += left
            continue
        length, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a record, or its last part
            record: Any = record_type.FromString(whole)
            yield {one.key or ".".join(one.nested_key): one.value_json for one in record.history.item}
            whole = b""


@pytest.mark.trackers
def test_a_tracker_that_is_down_does_not_stop_a_run(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = "{class_path: MLFlowLogger, init_args: {tracking_uri: 'http://127.0.0.1:9'}}"
    fit(tiny, f"[{logger}, CSVLogger]")
    told = [line for line in capsys.readouterr().err.splitlines() if "MLFlowLogger" in line]
    assert len(told) == 1 and "logs nothing more in this session, and the run continues" in told[0]
    assert (tiny / "runs" / "tiny" / "version_0" / "metrics.csv").is_file()
