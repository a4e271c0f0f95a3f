"""Shows how far a run is: tokens, tokens/s, time left, loss, stage."""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from lightning_danube.extras import install_command, missing_module
from lightning_danube.outside.texts import printable
from lightning_danube.pretraining.position import finished_stage, stage_name
from lightning_danube.terminal import show
from lightning_danube.training.position import end_of_run, tokens_done

BAR = "{desc}{percentage:3.0f} %|{bar}| {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}"
STANDING = "{desc}{percentage:3.0f} %|{bar}| {n_fmt}/{total_fmt}"
EVALUATING = "{desc}{percentage:3.0f} %|{bar}| {n_fmt}/{total_fmt}"


def say(trainer: Trainer, text: str) -> None:
    """Prints text on rank zero, above the progress bar if there is one."""
    if trainer.is_global_zero:
        bar = trainer.progress_bar_callback
        if isinstance(bar, Progress):
            bar.print(text)
        else:
            show(text)


def can_draw(trainer: Trainer) -> bool:
    """Whether figures for TensorBoard can be drawn. If not, prints why."""
    if missing_module("figures") is None:
        return True
    say(trainer, f"no figure is drawn without matplotlib; type: {install_command('figures')}")
    return False


class Progress(ProgressBar):
    """One live line on a terminal: stage, tokens, speed, time left and loss, or that the run evaluates. In logs and
    CI, a plain line at the end of each stage, and from time to time in a long one.

    Args:
        seconds_between_lines: longest time between two plain lines.
    """

    def __init__(self, seconds_between_lines: float = 600.0) -> None:
        super().__init__()
        self._enabled = True
        self._live: LiveLine | None = None
        self._plain = PlainLines(seconds_between_lines)

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        with nullcontext() if self._live is None else self._live.hidden():
            show(" ".join(map(str, args)))

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.on_train_start(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._plain.start(tokens_done(trainer), time.monotonic())
        if self._enabled and self._live is None and sys.stderr.isatty():
            self._live = LiveLine(tokens_done(trainer), end_of_run(trainer))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._live is not None and self._live.evaluated:
            self._live.train(tokens_done(trainer), stage_name(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._enabled:
            return
        now, done = time.monotonic(), tokens_done(trainer)
        ends_stage = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 and finished_stage(trainer) is not None
        if self._live is not None and self._live.is_due(now):
            self._live.train(done, stage_name(trainer), loss_of(trainer))
        elif self._live is None and self._plain.is_due(now, done, ends_stage):
            show(self._plain.line(done, end_of_run(trainer), loss_of(trainer), now))

    def on_validation_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._live is not None:
            self._live.evaluate(tokens_done(trainer), evaluation_batches(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._live is not None:
            self._live.train(tokens_done(trainer), None, loss_of(trainer))
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        live, self._live = self._live, None
        if live is not None:
            live.close()


def loss_of(trainer: Trainer) -> float | None:
    """Returns the training loss of the last logged step."""
    loss = trainer.callback_metrics.get("loss/train")
    return None if loss is None else float(loss)


def evaluation_batches(trainer: Trainer) -> int | None:
    """Returns the batches of an evaluation during training; None if their number is not finite."""
    numbers = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
    total = sum(numbers) if isinstance(numbers, list) else numbers
    return None if total == float("inf") else int(total)


class LiveLine:
    """A line that is updated in place: what the run does now, and how far it is.

    Args:
        done, total: tokens of the run.
    """

    def __init__(self, done: int, total: int) -> None:
        self.evaluated = 0
        """Batches of the evaluation that is under way."""
        self._last = 0.0
        self._bar = tqdm(
            desc="starting: ",
            total=total,
            initial=done,
            unit=" tokens",
            unit_scale=True,
            dynamic_ncols=True,
            bar_format=STANDING,
        )
        self.close = self._bar.close

    def hidden(self) -> AbstractContextManager[None]:
        """Removes the line for the time of a block, in which other lines are printed."""
        manager: AbstractContextManager[None] = self._bar.external_write_mode(file=sys.stdout)
        return manager

    def is_due(self, now: float) -> bool:
        """Returns whether the line was last drawn half a second ago."""
        return now - self._last >= 0.5

    def train(self, done: int, stage: str | None, loss: float | None = None) -> None:
        """Shows how far the training is. Speed and time left are those of the whole session."""
        self._last, self.evaluated = time.monotonic(), 0
        self._bar.bar_format, self._bar.n = BAR if done > self._bar.initial else STANDING, done
        self._draw("training" if stage is None else f"stage {stage}", "" if loss is None else f"loss {loss:.3f}")

    def evaluate(self, done: int, batches: int | None) -> None:
        """Shows that the run evaluates one more batch. There is no speed meanwhile, and no loss."""
        self.evaluated += 1
        self._bar.bar_format, self._bar.n = STANDING, done
        self._draw(f"evaluating, batch {self.evaluated}" + ("" if batches is None else f" of {batches}"), "")

    def _draw(self, does: str, rest: str) -> None:
        # Names of stages are texts of a configuration. A line end would leave lines that are never removed.
        self._bar.set_description(printable(" ".join(does.split())), refresh=False)
        self._bar.set_postfix_str(rest, refresh=False)
        self._bar.refresh()


class PlainLines:
    """Lines for a file: at the end of each stage, and from time to time.

    Args:
        seconds: longest time between two lines.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._start: tuple[float, int] = (0.0, 0)
        self._last, self._last_loss = 0.0, float("nan")

    def start(self, done: int, now: float) -> None:
        """Begins a session that finds some tokens done."""
        self._start, self._last = (now, done), now

    def is_due(self, now: float, done: int, ends_stage: bool) -> bool:
        """Returns whether a line is due. Before the end of the first step there is nothing to say."""
        return done > self._start[1] and (ends_stage or now - self._last >= self.seconds)

    def line(self, done: int, total: int, loss: float | None, now: float) -> str:
        """Returns how far the run is. The loss is left out if it is still that of the last line."""
        self._last, new = now, loss if loss != self._last_loss else None
        self._last_loss = float("nan") if loss is None else loss
        return plain_line(done, total, new, self._start, now)


def plain_line(done: int, total: int, loss: float | None, start: tuple[float, int], now: float) -> str:
    """Returns how far a run is, the loss if it is given, the speed of this session, and the time left.

    Args:
        done, total: tokens.
        start: the time when the session began, and the tokens that were done then, fewer than now.
    """
    seconds, at = start
    speed = (done - at) / max(now - seconds, 1e-9)
    left = tqdm.format_interval((total - done) / speed)
    shown = "" if loss is None else f", loss {loss:.3f}"
    return f"  {done:,} of {total:,} tokens{shown}, {speed:,.0f} tokens/s, {left} left"
