"""When the curve of the held-out loss has a point, and on how many rows."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_danube.training.trackers.loss_curve import (
    POINTS,
    HeldOutCurve,
    LossCurve,
    batches_within_budget,
    next_point,
)
from lightning_danube.yaml_files import load_yaml


@pytest.mark.parametrize("total", [1, 3, 9, 10, 11, 26, 100, 1564])
def test_a_run_has_a_point_at_each_tenth_and_at_its_end(total: int) -> None:
    step, points = 0, []
    while step < total:
        step = next_point(step, total)
        points.append(step)
    assert points[-1] == total and len(points) == min(POINTS, total)
    assert all(abs(point / total - (k + 1) / POINTS) < 1 / total for k, point in enumerate(points) if total >= POINTS)


@pytest.mark.parametrize("resumed_at", [0, 1, 13, 77, 99])
def test_a_resume_does_not_move_the_points(resumed_at: int) -> None:
    assert next_point(resumed_at, 100) == (resumed_at // 10 + 1) * 10


def test_all_points_together_cost_at_most_a_hundredth_of_the_run() -> None:
    for run_rows, sources, batch in ((6256, 5, 4), (100_000, 3, 8), (10**9, 6, 768)):
        batches = batches_within_budget(run_rows, sources, batch)
        forward_rows = (POINTS + 1) * sources * batches * batch
        assert batches == 1 or forward_rows / 3 <= 0.01 * run_rows < (forward_rows + 11 * sources * batch) / 3
    assert batches_within_budget(10, 5, 4) == 1, "a short run has a curve, too"


@pytest.fixture
def trainer() -> Any:
    """A run of 30 steps of two micro-batches, on data without stages."""
    return SimpleNamespace(
        datamodule=SimpleNamespace(total_steps=30, batch_rows=16, held_out_sets=2, micro_batch_size=8),
        val_check_interval=1.0,
        enable_validation=True,
        num_sanity_val_steps=0,
        fast_dev_run=False,
        sanity_checking=False,
        world_size=1,
        global_step=0,
        accumulate_grad_batches=2,
        val_check_batch=None,
        state=SimpleNamespace(fn="fit"),
    )


@pytest.fixture
def task() -> Any:
    return SimpleNamespace(has_loss_curve=True, curve=LossCurve())


def test_a_run_without_stages_measures_a_few_rows_at_each_tenth_and_all_at_its_end(trainer: Any, task: Any) -> None:
    plan, points = HeldOutCurve(), []
    plan.on_fit_start(trainer, task)
    assert trainer.num_sanity_val_steps == task.curve.batches == 1
    trainer.sanity_checking = True
    plan.on_validation_start(trainer, task)
    assert task.curve.is_brief
    trainer.sanity_checking = False
    plan.on_train_start(trainer, task)
    while trainer.global_step < 30:
        trainer.global_step = trainer.val_check_batch // 2
        plan.on_validation_start(trainer, task)
        points.append((trainer.global_step, task.curve.is_brief))
        plan.on_validation_end(trainer, task)
    assert points == [(3 * k, k < 10) for k in range(1, 11)]


def test_all_rows_before_training_are_measured_if_asked_for(trainer: Any, task: Any) -> None:
    trainer.num_sanity_val_steps, trainer.sanity_checking = float("inf"), True
    plan = HeldOutCurve()
    plan.on_fit_start(trainer, task)
    plan.on_validation_start(trainer, task)
    assert trainer.num_sanity_val_steps == float("inf") and not task.curve.is_brief


@pytest.mark.parametrize("change", [{"val_check_interval": 5}, {"enable_validation": False}, {"datamodule": None}])
def test_other_runs_are_not_planned(change: dict[str, Any], trainer: Any, task: Any) -> None:
    vars(trainer).update(change)
    plan = HeldOutCurve()
    plan.on_fit_start(trainer, task)
    plan.on_train_start(trainer, task)
    assert trainer.val_check_batch is None and task.curve == LossCurve() and trainer.num_sanity_val_steps == 0


FOLDER = Path(__file__).parents[3] / "lightning_danube" / "configs"
TUNING = ("SupervisedFineTuning", "PreferenceTuning", "TextClassification")
CONFIGS = [
    file for file in sorted(FOLDER.rglob("*.yaml")) if any(f".{task}" in file.read_text("utf-8") for task in TUNING)
]


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_shipped_configurations_of_fine_tuning_keep_the_curve(file: Path) -> None:
    """The curve has a point before the first step and at each tenth, unless the trainer plans the validations."""
    trainer = load_yaml(file.read_text("utf-8")).get("trainer", {})
    assert not {"val_check_interval", "check_val_every_n_epoch", "limit_val_batches"} & set(trainer)


def test_each_task_of_fine_tuning_has_a_quickstart() -> None:
    assert {"sft", "dpo", "classification"} <= {file.parent.name for file in CONFIGS if file.stem == "quickstart"}
