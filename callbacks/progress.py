"""Shows how far a run is: tokens, tokens a second, time left, loss, stage."""

from __future__ import annotations

import sys
import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from lightning_danube.extras import install_command, missing_module
from lightning_danube.pretraining.position import stage_name
from lightning_danube.training.position import end_of_run, tokens_done

BAR = "{desc} {percentage:3.0f} %|{bar}| {n_fmt}/{total_fmt}, {rate_fmt}, {remaining} left{postfix}"


def say(trainer: Trainer, text: str) -> None:
    """Prints text on rank zero, above the progress bar if there is one."""
    if trainer.is_global_zero:
        bar = trainer.progress_bar_callback
        if isinstance(bar, Progress):
            bar.print(text)
        else:
            print(text, flush=True)


def can_draw(trainer: Trainer) -> bool:
    """Whether figures for TensorBoard can be drawn. If not, prints why."""
    if missing_module("figures") is None:
        return True
    say(trainer, f"no figure is drawn without matplotlib; type: {install_command('figures')}")
    return False


class Progress(ProgressBar):
    """A bar over the tokens of the run on a terminal. Elsewhere (logs, CI), a plain line from time to time.

    Args:
        seconds_between_lines: time between two plain lines.
    """

    def __init__(self, seconds_between_lines: float = 30.0) -> None:
        super().__init__()
        self.seconds_between_lines = seconds_between_lines
        self._bar: tqdm[Any] | None = None
        self._enabled = True
        self._last_line = 0.0
        self._last_loss: float | None = None
        self._start: tuple[float, int] = (0.0, 0)

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        write: Any = print if self._bar is None else self._bar.write
        write(" ".join(map(str, args)), file=sys.stdout)
        sys.stdout.flush()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        self._start = (time.monotonic(), tokens_done(trainer))
        self._last_line = time.monotonic()
        if sys.stderr.isatty():
            self._bar = token_bar(end_of_run(trainer), tokens_done(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._enabled:
            return
        now = time.monotonic()
        if now - self._last_line < (0.5 if sys.stderr.isatty() else self.seconds_between_lines):
            return
        self._last_line = now
        loss = trainer.callback_metrics.get("loss/train")
        nats = None if loss is None else float(loss)
        if self._bar is not None:
            move_bar(self._bar, tokens_done(trainer), stage_name(trainer), nats)
        else:
            # The loss changes only at logged steps. Printed again, it would look as if it did not change any more.
            new, self._last_loss = (nats if nats != self._last_loss else None), nats
            print(plain_line(tokens_done(trainer), end_of_run(trainer), new, self._start, now), flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            move_bar(self._bar, tokens_done(trainer))
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def token_bar(total: int, done: int) -> tqdm[Any]:
    """Returns a bar over the tokens of a run, of which some may be done already."""
    return tqdm(
        total=total,
        initial=done,
        unit=" tokens",
        unit_scale=True,
        dynamic_ncols=True,
        smoothing=0.1,
        bar_format=BAR,
    )


def move_bar(bar: tqdm[Any], done: int, stage: str | None = None, loss: float | None = None) -> None:
    """Shows how many tokens are done on a bar, and the stage and the loss if they are given."""
    if stage is not None:
        bar.set_description(f"stage {stage}", refresh=False)
    if loss is not None:
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
    bar.n = done
    bar.refresh()


def plain_line(done: int, total: int, loss: float | None, start: tuple[float, int], now: float) -> str:
    """Returns how far a run is, the loss if it is given, the speed of this session, and the time left.

    Args:
        done, total: tokens.
        start: the time when the session began, and the tokens that were done then.
    """
    seconds, at = start
    speed = (done - at) / max(now - seconds, 1e-9)
    # Before the end of the first step, which may take long, no speed is known.
    left = tqdm.format_interval((total - done) / speed) if speed else "?"
    shown = "" if loss is None else f", loss {loss:.3f}"
    return f"  {done:,} of {total:,} tokens{shown}, {speed:,.0f} tokens/s, {left} left"
