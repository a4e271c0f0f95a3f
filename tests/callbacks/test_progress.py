"""The live line and the plain lines of a run's progress."""

import io
import sys
from typing import Any

import pytest
import torch

from lightning_danube.callbacks import Progress
from lightning_danube.callbacks.progress import LiveLine, plain_line
from lightning_danube.training.task import DecoderTask
from tests.callbacks.conftest import Clock


def test_speed_and_time_left_are_those_of_this_session() -> None:
    # Resumed at 4,000 tokens; 1,000 more in 10 s, so 5,000 more take 50 s.
    line = plain_line(5000, 10_000, 2.5, start=(100.0, 4000), now=110.0)
    assert line == "  5,000 of 10,000 tokens, loss 2.500, 100 tokens/s, 00:50 left"


def test_a_line_comes_at_the_end_of_a_stage_and_from_time_to_time(
    trainer: Any, task: DecoderTask, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stages of 4 and 2 steps, of two micro-batches."""
    progress = Progress(seconds_between_lines=20.0)
    progress.on_train_start(trainer, task)
    clock.now += 100
    progress.on_train_batch_end(trainer, task, None, None, 0)
    assert capsys.readouterr().out == "", "no step is done: nothing is known yet"
    clock.now -= 100
    for micro_batch, loss in enumerate([3.0, 3.0, 3.0, 2.5, 2.5, 2.5, 2.5, 2.5, 2.5, 2.0, 2.0, 2.0]):
        clock.now += 5
        trainer.global_step = (micro_batch + 1) // 2
        trainer.callback_metrics = {"loss/train": torch.tensor(loss)}
        progress.on_train_batch_end(trainer, task, None, None, micro_batch)
    assert capsys.readouterr().out.splitlines() == [
        "  128 of 384 tokens, loss 2.500, 6 tokens/s, 00:40 left",
        "  256 of 384 tokens, 6 tokens/s, 00:20 left",
        "  384 of 384 tokens, loss 2.000, 6 tokens/s, 00:00 left",
    ]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_one_line_that_says_when_the_run_evaluates(
    trainer: Any, task: DecoderTask, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    trainer.num_sanity_val_batches, trainer.num_val_batches = [1, 1], [3, float("inf")]
    progress, batch = Progress(), (trainer, task, None, None)

    def drawn() -> str:
        """The line as it is drawn last."""
        return terminal.getvalue().rstrip().rpartition("\r")[2].strip()

    trainer.sanity_checking = True
    progress.on_sanity_check_start(trainer, task)
    progress.on_validation_batch_end(*batch, 0)
    assert drawn().startswith("evaluating, batch 1 of 2:") and "tokens/s" not in drawn()
    trainer.sanity_checking = False
    progress.on_train_start(trainer, task)
    progress.on_train_batch_start(trainer, task, None, 0)
    assert drawn().startswith("stage one:") and "tokens/s" not in drawn(), "no step is done"
    clock.now += 2
    trainer.global_step, trainer.callback_metrics = 4, {"loss/train": torch.tensor(2.5)}
    progress.on_train_batch_end(*batch, 7)
    assert drawn().startswith("stage two:") and "256/384" in drawn() and drawn().endswith("left, loss 2.500")
    progress.on_validation_batch_end(*batch, 0)
    assert drawn().startswith("evaluating, batch 1:") and "256/384" in drawn() and "loss" not in drawn()
    progress.on_train_batch_start(trainer, task, None, 8)
    assert drawn().startswith("stage two:")
    trainer.global_step = 6
    progress.on_train_end(trainer, task)
    assert drawn().startswith("training: 100 %") and "384/384" in drawn()


def test_a_name_of_a_configuration_is_shown_and_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    line = LiveLine(0, 100)
    line.train(10, "one\x1b[2J\ntwo\r\u202e", 2.0)
    line.close()
    drawn = terminal.getvalue()
    assert "stage one\\x1b[2J two \\u202e" in drawn or "stage one\\x1b[2J two\\u202e" in drawn
    assert "\x1b[2J" not in drawn and "\u202e" not in drawn and "one\n" not in drawn


def test_a_progress_that_is_disabled_is_silent(
    trainer: Any, task: DecoderTask, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(seconds_between_lines=0.0)
    progress.disable()
    progress.on_train_start(trainer, task)
    progress.on_train_batch_end(trainer, task, None, None, 0)
    assert capsys.readouterr().out == ""
