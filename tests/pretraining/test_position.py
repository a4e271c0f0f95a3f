"""Where a run stands in its curriculum."""

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_danube.pretraining.curriculum import Curriculum, Stage
from lightning_danube.pretraining.data import CurriculumData
from lightning_danube.pretraining.position import curriculum_of, finished_stage, has_stages, samples_done, stage_name

STAGES = [Stage("one", 2048, {"web": 1}), Stage("two", 1024, {"web": 1})]


def at(step: int) -> Any:
    """A trainer after some steps of a run of 4 and 2 steps."""
    data = CurriculumData.__new__(CurriculumData)
    data.batch_samples = 8
    data.curriculum = Curriculum(STAGES, {"web": 100}, context_length=64, batch_samples=8, seed=0)
    return SimpleNamespace(datamodule=data, global_step=step)


def test_samples_are_those_of_whole_steps() -> None:
    assert [samples_done(at(step)) for step in (0, 1, 4, 6)] == [0, 8, 32, 48]
    assert curriculum_of(at(0))[1].total_steps == 6


def test_a_stage_is_finished_at_its_last_step_only() -> None:
    assert [finished_stage(at(step)) for step in range(7)] == [None, None, None, None, 0, None, 1]


def test_the_stage_is_that_of_the_next_sample() -> None:
    assert [stage_name(at(step)) for step in range(7)] == ["one"] * 4 + ["two"] * 3


def test_other_data_have_no_stages() -> None:
    trainer: Any = SimpleNamespace(datamodule=object(), global_step=3)
    assert not has_stages(trainer) and finished_stage(trainer) is None and stage_name(trainer) is None
    with pytest.raises(ValueError, match="this callback counts the stages of CurriculumData"):
        curriculum_of(trainer)
