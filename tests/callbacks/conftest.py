"""What callbacks see of a run, without a run: a trainer whose position a test sets, data, a task, and a clock."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_danube.pretraining.curriculum import Curriculum, Stage
from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.text.corpora import Source
from lightning_danube.training.optim import AdamW, LearningRate
from lightning_danube.training.task import DecoderTask
from tests.tiny_models import tiny_decoder


class Log:
    """A logger that remembers: (step, values) in the order of logging."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((step, dict(metrics)))


class Clock:
    """Seconds that pass only when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.fixture
def data() -> CurriculumData:
    """Stages of 4 and 2 steps. A step has 8 rows of 8 tokens, in two micro-batches."""
    stages = [Stage("one", 256, {"web": 3, "wiki": 1}), Stage("two", 128, {"wiki": 1})]
    sources = {name: Source(f"{name}.txt") for name in ("web", "wiki")}
    data = CurriculumData(sources, stages, context_length=8, batch_tokens=64, micro_batch_size=4)
    data.curriculum = Curriculum(stages, {"web": 50, "wiki": 50}, context_length=8, batch_samples=8, seed=0)
    return data


@pytest.fixture
def trainer(data: CurriculumData, tmp_path: Path) -> Any:
    """A trainer in the midst of `fit`, on one device; its directory is `tmp_path`."""
    return SimpleNamespace(
        datamodule=data,
        global_step=0,
        max_steps=-1,
        accumulate_grad_batches=2,
        log_every_n_steps=1,
        world_size=1,
        global_rank=0,
        is_global_zero=True,
        distributed_sampler_kwargs={"num_replicas": 1, "rank": 0},
        state=SimpleNamespace(fn="fit"),
        sanity_checking=False,
        fast_dev_run=False,
        precision="32-true",
        ckpt_path=None,
        callback_metrics={},
        progress_bar_callback=None,
        logger=None,
        loggers=[Log()],
        log_dir=str(tmp_path),
        default_root_dir=str(tmp_path),
        strategy=SimpleNamespace(root_device="cpu", broadcast=lambda value: value, checkpoint_io=None),
    )


@pytest.fixture
def task() -> DecoderTask:
    return DecoderTask(tiny_decoder(), LearningRate(1e-3, 1e-4, 0), AdamW())
