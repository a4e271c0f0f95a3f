"""Facts about a run: callbacks fill them in, and the summaries of the tasks read them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule
from torch import Tensor, nn


@dataclass
class RunFacts:
    """Facts that one callback measures and another callback reports. A task makes one object, `task.run_facts`.

    A field keeps its default if the run does not use the callback that fills the field in.
    """

    training_seconds: float = 0.0
    """Seconds spent in training steps, over all sessions of the run. From Throughput."""
    tokens_by_source: Callable[[], list[dict[str, int]]] | None = None
    """Returns source → tokens seen, for each stage. A collective call: every rank must make it. From TokenLedger."""
    skipped_steps: Callable[[], int] | None = None
    """Returns the number of skipped optimizer steps. Waits for the device. From SkipBadSteps."""
    recall: dict[str, Any] | None = None
    """How many facts of the invented world the model knows. From FactRecall."""
    samples: dict[str, str] = field(default_factory=dict)
    """Prompt → the prompt and its latest continuation. From TextSamples."""
    held_out_counts: dict[str, int] = field(default_factory=dict)
    """Source → tokens or pairs behind its last `loss/held_out_…`. From the task.

    They are fewer than the data holds if Lightning's `limit_val_batches` or `limit_test_batches` leaves batches out.
    """


def run_facts_of(task: LightningModule) -> RunFacts:
    """Returns the facts of the run that trains a task.

    Raises:
        ValueError: the LightningModule is not a task of this project.
    """
    facts = getattr(task, "run_facts", None)
    if not isinstance(facts, RunFacts):
        raise ValueError(
            f"{type(task).__name__} has no run_facts: use a task of lightning_danube, or remove the callbacks that "
            "report on one"
        )
    return facts


class Trained(NamedTuple):
    """The progress of a run."""

    steps: int
    """Optimizer steps."""
    precision: str | int
    seconds: float
    """Seconds of the run, over all its sessions."""


class RunClock:
    """Counts the seconds of a run over all its sessions."""

    def __init__(self) -> None:
        self._before = 0.0
        self._began = time.monotonic()

    def start(self) -> None:
        """Restarts the count of this session."""
        self._began = time.monotonic()

    def resume(self, seconds: float) -> None:
        """Adds the seconds of the earlier sessions."""
        self._before = seconds

    def seconds(self) -> float:
        """Returns the seconds of the earlier sessions and this one."""
        return self._before + time.monotonic() - self._began


def trained_parameters(module: nn.Module) -> int:
    """Returns the number of parameters that train."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def rate(amount: float, seconds: float, digits: int = 1) -> float | None:
    """Returns an amount per second, rounded to some digits; None if no time was measured."""
    return round(amount / seconds, digits) if seconds else None


def metrics_of_sources(metrics: Mapping[str, Tensor | float], prefix: str = "loss/held_out_") -> dict[str, float]:
    """Returns source → value of the metrics whose name is the prefix plus the source's name.

    Args:
        metrics: the trainer's `callback_metrics`, which hold the metrics of the last validation.
    """
    return {name.removeprefix(prefix): float(value) for name, value in metrics.items() if name.startswith(prefix)}
