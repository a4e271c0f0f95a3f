"""What a run tells its loggers, as TensorBoard reads it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_danube.training.trackers.kept import kept
from lightning_danube.training.trackers.run_logs import CHARTS, RunLogs, log_settings, logged_settings

CONFIG = {
    "name": "tiny",
    "seed_everything": 3,
    "data": {
        "class_path": "Data",
        "init_args": {
            "batch_tokens": 100,
            "stages": [{"name": "one", "tokens": "3K", "mix": {"web": 90.6}}, {"name": "two", "tokens": 400}],
            "filters": None,
            "sources": {"web": {"path": "web.jsonl"}},
        },
    },
    "model": {"class_path": "Model", "init_args": {"learning_rate": {"peak": 1e-3, "shape": "linear"}}},
    "trainer": {"precision": "32-true", "callbacks": [{"class_path": "Progress"}], "default_root_dir": "here"},
}


def test_settings_are_named_as_on_the_command_line() -> None:
    assert dict(logged_settings(CONFIG)) == {
        "seed_everything": 3,
        "data.batch_tokens": 100,
        "data.stages.one.tokens": "3K",
        "data.stages.one.mix.web": 90.6,
        "data.stages.two.tokens": 400,
        "model.class_path": "Model",
        "model.learning_rate.peak": 1e-3,
        "model.learning_rate.shape": "linear",
        "trainer.precision": "32-true",
    }


def test_mlflow_gets_the_settings_of_a_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = object.__new__(MLFlowLogger)
    told: list[Any] = []
    monkeypatch.setattr(MLFlowLogger, "log_hyperparams", lambda self, settings: told.append(settings))
    log_settings([logger], CONFIG, resumed=True)
    assert told == []
    log_settings([logger], CONFIG, resumed=False)
    assert told == [dict(logged_settings(CONFIG))]


def session(logger: Any, first: int, last: int) -> None:
    """Steps of 100 tokens."""
    trainer: Any = SimpleNamespace(
        datamodule=SimpleNamespace(batch_tokens=100),
        loggers=[logger],
        global_step=first,
        state=SimpleNamespace(fn="fit"),
        sanity_checking=False,
    )
    task: Any = None
    logs = RunLogs()
    logs.setup(trainer, task, "fit")
    monkey: Any = __import__("lightning_danube.training.trackers.run_logs", fromlist=["x"])
    monkey.tokens_done, before = lambda trainer: 100 * trainer.global_step, monkey.tokens_done
    try:
        logs.on_train_start(trainer, task)
    finally:
        monkey.tokens_done = before
    for step in range(first + 1, last + 1):
        logger.log_metrics({"loss/train": float(step), "held_out/web": 1.0}, step)
    logs.on_validation_end(trainer, task)
    logs.on_train_end(trainer, task)
    logger.finalize("success")


def test_tensorboard_has_the_charts_and_the_row_of_a_run_that_was_resumed(tmp_path: Path) -> None:
    for first, last in ((0, 4), (2, 6)):
        logger = kept(TensorBoardLogger(tmp_path, name="run", version="version_0"))
        log_settings([logger], CONFIG, resumed=first > 0)
        session(logger, first, last)
    events = EventAccumulator(str(tmp_path / "run" / "version_0"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/train")] == [(100 * step, step) for step in range(1, 7)]
    layout = layout_pb2.Layout.FromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    assert {group.title: [chart.title for chart in group.chart] for group in layout.category} == {
        "loss": list(CHARTS["loss"]), "speed": ["optimizer steps"]
    }  # fmt: skip
    metadata = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = plugin_data_pb2.HParamsPluginData.FromString(metadata).experiment
    assert {info.name for info in experiment.hparam_infos} == dict(logged_settings(CONFIG)).keys()
    assert {info.name.tag for info in experiment.metric_infos} == {
        "loss/train", "held_out/web", "loss/held_out_web", "throughput/tokens_per_second"
    }  # fmt: skip
