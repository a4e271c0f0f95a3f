"""A run's facts, its clock, and the numbers that all summaries report."""

import time

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_danube.training.run_facts import RunClock, metrics_of_sources, rate, run_facts_of, trained_parameters


def test_a_clock_adds_the_sessions_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = RunClock()
    now = 107.0
    assert clock.seconds() == 7.0
    clock.start()
    now = 110.0
    clock.resume(60.0)
    assert clock.seconds() == 63.0


def test_a_rate_needs_a_time() -> None:
    assert rate(10, 4.0) == 2.5
    assert rate(10, 3.0, digits=2) == 3.33
    assert rate(10, 0.0) is None


def test_metrics_are_found_by_their_prefix() -> None:
    metrics = {"loss/held_out_web": torch.tensor(2.5), "loss/train": torch.tensor(9.0), "x_a": torch.tensor(1.0)}
    assert metrics_of_sources(metrics) == {"web": 2.5}
    assert metrics_of_sources(metrics, "x_") == {"a": 1.0}


def test_frozen_parameters_do_not_count_as_trained() -> None:
    module = nn.Linear(3, 4)
    module.weight.requires_grad_(False)
    assert trained_parameters(module) == 4


def test_another_task_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="BoringModel has no run_facts: use a task of lightning_danube, or remove"):
        run_facts_of(BoringModel())
