"""Names of checkpoints, and which of them stay. Whole runs: test_checkpoints_on_disk.py."""

from inspect import signature
from pathlib import Path

import pytest
from lightning.pytorch import Trainer

from lightning_danube.checkpoints.schedule import (
    CheckpointSchedule,
    older_checkpoints,
    stage_checkpoint,
    step_checkpoint,
)


@pytest.mark.parametrize("keep", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_the_newest_checkpoints_stay(tmp_path: Path, keep: int, count: int) -> None:
    paths = [step_checkpoint(tmp_path, step) for step in range(1, count + 1)]
    for path in paths:
        path.touch()
    older = older_checkpoints(tmp_path, count, keep)
    assert [path for path in paths if path not in older] == paths[max(0, count - keep) :]
    assert older == paths[: max(0, count - keep)]


def test_later_checkpoints_and_stages_do_not_count(tmp_path: Path) -> None:
    """A run that went back to step 3, because of a damaged checkpoint, does not remove step 3 for step 9."""
    for path in (*(step_checkpoint(tmp_path, step) for step in (2, 3, 9)), stage_checkpoint(tmp_path, 0, "a", 1)):
        path.touch()
    assert older_checkpoints(tmp_path, 3, keep=1) == [step_checkpoint(tmp_path, 2)]


def test_a_stage_is_named_by_what_a_file_may_be_called(tmp_path: Path) -> None:
    path = stage_checkpoint(tmp_path, 1, "web / high quality", 12)
    assert path == tmp_path / "stage_2_web-high-quality_step_00000012.ckpt"


def test_a_run_is_saved_at_every_nth_step() -> None:
    assert [step for step in range(1, 10) if CheckpointSchedule(3, 2).is_due(step)] == [3, 6, 9]
    with pytest.raises(ValueError, match="every_n_steps is 3 and keep is 0: both must be at least 1"):
        CheckpointSchedule(3, 0)


def test_lightning_still_says_in_private_whether_it_validates_next() -> None:
    loop = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit_loop
    assert loop._data_fetcher is None, "set when a fit begins"
    assert list(signature(loop.epoch_loop._should_check_val_fx).parameters) == ["data_fetcher"]
