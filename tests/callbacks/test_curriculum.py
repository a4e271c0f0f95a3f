"""When the next validation comes, and how stages are announced."""

from typing import Any

import pytest

from lightning_danube.callbacks import CurriculumStages
from lightning_danube.training.task import DecoderTask
from lightning_danube.training.trackers import loss_curve


def planned(trainer: Any, task: DecoderTask, step: int, every: int | str | None = None) -> int | None:
    """The micro-batch after which a run that starts at this step is validated first."""
    trainer.global_step, trainer.val_check_batch = step, None
    CurriculumStages(every).on_train_start(trainer, task)
    found: int | None = trainer.val_check_batch
    return found


def measured(trainer: Any, task: DecoderTask, every: int | None = None, start: int = 0) -> dict[int, bool]:
    """Step → whether all held-out rows are measured there, or a few, in a run of 6 steps that starts at a step."""
    stages, found = CurriculumStages(every), {}
    trainer.global_step, trainer.num_sanity_val_steps, trainer.fast_dev_run = start, 0, False
    stages.on_fit_start(trainer, task)
    stages.on_train_start(trainer, task)
    while trainer.global_step < 6:
        assert trainer.val_check_batch % 2 == 0, "a step has two micro-batches"
        trainer.global_step = trainer.val_check_batch // 2
        stages.on_validation_start(trainer, task)
        found[trainer.global_step] = not task.curve.is_brief
        stages.on_validation_end(trainer, task)
    return found


def test_all_rows_are_measured_at_the_end_of_each_stage(
    trainer: Any, task: DecoderTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages of 4 and 2 steps. A run of 6 steps has a point of its curve at each."""
    assert measured(trainer, task) == {1: False, 2: False, 3: False, 4: True, 5: False, 6: True}
    assert measured(trainer, task, start=4) == {5: False, 6: True}
    monkeypatch.setattr(loss_curve, "POINTS", 2)
    assert measured(trainer, task) == {3: False, 4: True, 6: True}


def test_all_rows_are_also_measured_at_intervals_of_whole_steps(
    trainer: Any, task: DecoderTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """65 tokens are two steps of 64. Intervals count from the beginning of the run, not from a resume."""
    monkeypatch.setattr(loss_curve, "POINTS", 1)
    assert measured(trainer, task, 65) == {2: True, 4: True, 6: True} == measured(trainer, task, 65, start=1)
    assert measured(trainer, task, 3 * 64) == {3: True, 4: True, 6: True}


def test_before_the_first_step_a_few_rows_are_measured(trainer: Any, task: DecoderTask) -> None:
    stages = CurriculumStages()
    trainer.num_sanity_val_steps, trainer.sanity_checking = 0, True
    stages.on_fit_start(trainer, task)
    stages.on_validation_start(trainer, task)
    assert trainer.num_sanity_val_steps == task.curve.batches == 1 and task.curve.is_brief
    trainer.num_sanity_val_steps = float("inf")
    stages.on_validation_start(trainer, task)
    assert not task.curve.is_brief, "all rows were asked for"


def test_a_finished_run_plans_and_announces_nothing(
    trainer: Any, task: DecoderTask, capsys: pytest.CaptureFixture[str]
) -> None:
    assert planned(trainer, task, 6) is None
    assert capsys.readouterr().out == ""


def test_a_stage_is_announced_with_its_tokens_and_shares(
    trainer: Any, task: DecoderTask, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = CurriculumStages()
    stages.on_train_start(trainer, task)
    assert capsys.readouterr().out == "entering stage 1 of 2: one, 256 tokens: web 75.0 %, wiki 25.0 %\n"
    trainer.global_step = 2
    stages.on_train_start(trainer, task)
    assert capsys.readouterr().out.startswith("resuming stage 1 of 2: one")
    trainer.global_step = 4
    trainer.sanity_checking = True
    stages.on_validation_end(trainer, task)
    assert capsys.readouterr().out == ""
    trainer.sanity_checking = False
    stages.on_validation_end(trainer, task)
    assert capsys.readouterr().out == "stage 1 done: one\nentering stage 2 of 2: two, 128 tokens: wiki 100.0 %\n"
    trainer.global_step = 6
    stages.on_validation_end(trainer, task)
    assert capsys.readouterr().out == "stage 2 done: two\n"


def test_each_logged_step_has_the_stage_of_the_next_sample(trainer: Any, task: DecoderTask) -> None:
    stages = CurriculumStages()
    trainer.log_every_n_steps = 2
    for step in range(1, 7):
        trainer.global_step = step
        for batch_idx in (0, 1):
            stages.on_train_batch_end(trainer, task, None, None, batch_idx)
    assert trainer.loggers[0].rows == [(step, {"mix/stage": stage}) for step, stage in ((2, 1.0), (4, 2.0), (6, 2.0))]
