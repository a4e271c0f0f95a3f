"""One line that tells how far a run is: tokens, tokens a second, time left, loss, stage."""

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
    """Prints a line from rank zero without tearing the progress bar."""
    if trainer.is_global_zero:
        bar = trainer.progress_bar_callback
        if isinstance(bar, Progress):
            bar.print(text)
        else:
            print(text, flush=True)


def can_draw(trainer: Trainer) -> bool:
    """Whether figures for TensorBoard can be drawn; says why not."""
    if missing_module("figures") is None:
        return True
    say(trainer, f"no figure is drawn without matplotlib; type: {install_command('figures')}")
    return False


class Progress(ProgressBar):
    """A bar over the tokens of the run on a terminal; a plain line now and then elsewhere (logs, CI).

    Args:
        seconds_between_lines: how often a line is written where there is no terminal.
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

    @property
    def _on_terminal(self) -> bool:
        return sys.stderr.isatty()

    def print(self, *args: Any, **kwargs: Any) -> None:
        text = " ".join(map(str, args))
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
            sys.stdout.flush()
        else:
            print(text, flush=True)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._enabled:
            return
        total, done = self._tokens(trainer)
        self._start = (time.monotonic(), done)
        self._last_line = time.monotonic()
        if self._on_terminal:
            self._bar = tqdm(
                total=total,
                initial=done,
                unit=" tokens",
                unit_scale=True,
                dynamic_ncols=True,
                smoothing=0.1,
                bar_format=BAR,
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._enabled:
            return
        now = time.monotonic()
        if now - self._last_line < (0.5 if self._on_terminal else self.seconds_between_lines):
            return
        self._last_line = now
        total, done = self._tokens(trainer)
        loss = trainer.callback_metrics.get("loss/train")
        if self._bar is not None:
            if (stage := stage_name(trainer)) is not None:
                self._bar.set_description(f"stage {stage}", refresh=False)
            if loss is not None:
                self._bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
            self._bar.n = done
            self._bar.refresh()
        else:
            seconds, at = self._start
            rate = (done - at) / max(now - seconds, 1e-9)
            # Nothing is known before the first step, which an accumulation can make a long one.
            left = tqdm.format_interval((total - done) / rate) if rate else "?"
            # It is new at logged steps only. Said again it would look as if nothing had changed since.
            said = "" if loss is None or float(loss) == self._last_loss else f", loss {float(loss):.3f}"
            self._last_loss = None if loss is None else float(loss)
            print(
                f"  {done:,} of {total:,} tokens{said}, {rate:,.0f} tokens/s, {left} left",
                flush=True,
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._bar is not None:
            self._bar.n = self._tokens(trainer)[1]
            self._bar.refresh()
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @staticmethod
    def _tokens(trainer: Trainer) -> tuple[int, int]:
        return end_of_run(trainer), tokens_done(trainer)
