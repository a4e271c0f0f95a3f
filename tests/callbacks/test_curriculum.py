"""When the next validation comes, and how stages are announced."""

from typing import Any

import pytest

from lightning_danube.callbacks import CurriculumStages
from lightning_danube.training.task import DecoderTask


def planned(trainer: Any, task: DecoderTask, step: int, every: int | str | None = None) -> int:
    """The micro-batch after which a run that starts at this step is validated first."""
    trainer.global_step, trainer.val_check_batch = step, None
    CurriculumStages(every).on_train_start(trainer, task)
    found: int = trainer.val_check_batch
    return found


@pytest.mark.parametrize(("step", "micro_batch"), [(0, 8), (3, 8), (4, 12), (5, 12)], ids=lambda number: str(number))
def test_validation_comes_at_the_end_of_the_stage(step: int, micro_batch: int, trainer: Any, task: DecoderTask) -> None:
    """Stages of 4 and 2 steps, each of two micro-batches."""
    assert planned(trainer, task, step) == micro_batch


@pytest.mark.parametrize(("step", "ends"), [(0, 2), (1, 2), (2, 4), (4, 6), (5, 6)])
def test_validation_also_comes_at_intervals_of_whole_steps(
    step: int, ends: int, trainer: Any, task: DecoderTask
) -> None:
    """65 tokens are two steps of 64. Intervals count from the beginning of the run, not from a resume."""
    assert planned(trainer, task, step, 65) == 2 * ends


def test_intervals_count_from_the_beginning_of_the_run(trainer: Any, task: DecoderTask) -> None:
    assert [planned(trainer, task, step, 3 * 64) // 2 for step in range(6)] == [3, 3, 3, 4, 6, 6]


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
    assert capsys.readouterr().out.startswith("going on with stage 1 of 2: one")
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
