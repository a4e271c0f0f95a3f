"""The plain lines of a run's progress."""

from typing import Any

import pytest
import torch

from lightning_danube.callbacks import Progress
from lightning_danube.callbacks.progress import plain_line
from lightning_danube.training.task import DecoderTask
from tests.callbacks.conftest import Clock


def test_speed_and_time_left_are_those_of_this_session() -> None:
    # Resumed at 4,000 tokens; 1,000 more in 10 s, so 5,000 more take 50 s.
    line = plain_line(5000, 10_000, 2.5, start=(100.0, 4000), now=110.0)
    assert line == "  5,000 of 10,000 tokens, loss 2.500, 100 tokens/s, 00:50 left"
    assert plain_line(4000, 10_000, None, (100.0, 4000), 160.0) == "  4,000 of 10,000 tokens, 0 tokens/s, ? left"


def test_a_line_comes_from_time_to_time_and_tells_a_loss_once(
    trainer: Any, task: DecoderTask, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(seconds_between_lines=10.0)
    progress.on_train_start(trainer, task)
    for step, (seconds, loss) in enumerate([(4, 3.0), (6, 3.0), (3, 2.5), (8, 2.5), (10, 2.5), (10, 2.0)], start=1):
        clock.now += seconds
        trainer.global_step = step
        trainer.callback_metrics = {"loss/train": torch.tensor(loss)}
        progress.on_train_batch_end(trainer, task, None, None, step)
    assert capsys.readouterr().out.splitlines() == [
        "  128 of 384 tokens, loss 3.000, 13 tokens/s, 00:20 left",
        "  256 of 384 tokens, loss 2.500, 12 tokens/s, 00:10 left",
        "  320 of 384 tokens, 10 tokens/s, 00:06 left",
        "  384 of 384 tokens, loss 2.000, 9 tokens/s, 00:00 left",
    ]


def test_a_progress_that_is_disabled_is_silent(
    trainer: Any, task: DecoderTask, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(seconds_between_lines=0.0)
    progress.disable()
    progress.on_train_start(trainer, task)
    progress.on_train_batch_end(trainer, task, None, None, 0)
    assert capsys.readouterr().out == ""
