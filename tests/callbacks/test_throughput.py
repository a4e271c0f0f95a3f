"""Speed and utilisation, by hand. The clock is a test's own."""

from typing import Any

import pytest

from lightning_danube.callbacks import Throughput
from lightning_danube.training.task import DecoderTask
from tests.callbacks.conftest import Clock

TOKENS = 64
"""Of a step."""


def train(throughput: Throughput, trainer: Any, task: DecoderTask, clock: Clock, *seconds: float) -> None:
    """Makes steps of two micro-batches that take this long."""
    for of_step in seconds:
        for batch_idx in (0, 1):
            throughput.on_train_batch_start(trainer, task, None, batch_idx)
            clock.now += of_step / 2
            trainer.global_step += batch_idx
            throughput.on_train_batch_end(trainer, task, None, None, batch_idx)


def test_speed_is_that_since_the_last_logged_step(trainer: Any, task: DecoderTask, clock: Clock) -> None:
    throughput = Throughput()
    trainer.log_every_n_steps = 2
    throughput.on_train_start(trainer, task)
    train(throughput, trainer, task, clock, 30.0, 1.0)  # the first steps, which compile, are not logged
    assert trainer.loggers[0].rows == []
    train(throughput, trainer, task, clock, 2.0, 6.0, 1.0)
    assert trainer.loggers[0].rows == [(4, {"throughput/tokens_per_second": 2 * TOKENS / 8.0})]
    throughput.on_validation_start(trainer, task)
    clock.now += 500.0
    train(throughput, trainer, task, clock, 3.0)
    assert trainer.loggers[0].rows[1:] == [(6, {"throughput/tokens_per_second": 2 * TOKENS / 4.0})]
    assert throughput.seconds == task.run_facts.training_seconds == 43.0


def test_utilisation_is_the_models_arithmetic_over_the_peak_of_all_devices(
    trainer: Any, task: DecoderTask, clock: Clock
) -> None:
    throughput = Throughput(peak_flops=1e6)
    trainer.world_size = 4
    train(throughput, trainer, task, clock, 1.0, 0.5)
    # Two for each parameter of a matrix product and token, and as much for each product of queries and keys or of
    # scores and values; the backward pass takes twice as much.
    layers, width, context = 2, 64, 8
    matrices = sum(p.numel() for name, p in task.decoder.named_parameters() if "embed_tokens" not in name)
    flops_of_a_token = 3 * (2 * matrices + layers * 2 * (2 * width * context))
    ((step, logged),) = trainer.loggers[0].rows
    assert step == 2 and logged["throughput/tokens_per_second"] == 128.0
    assert logged["throughput/mfu"] == pytest.approx(128.0 * flops_of_a_token / (4 * 1e6))


def test_a_resumed_run_goes_on_counting_its_seconds(trainer: Any, task: DecoderTask, clock: Clock) -> None:
    before = Throughput()
    train(before, trainer, task, clock, 5.0, 2.0)
    trainer.loggers[0].rows.clear()
    after = Throughput()
    after.load_state_dict(before.state_dict())
    clock.now += 3600.0
    task.run_facts.training_seconds = 0.0
    after.on_train_start(trainer, task)
    assert task.run_facts.training_seconds == 7.0
    train(after, trainer, task, clock, 10.0)  # compiles again
    assert trainer.loggers[0].rows == []
    train(after, trainer, task, clock, 4.0)
    assert trainer.loggers[0].rows == [(4, {"throughput/tokens_per_second": TOKENS / 4.0})]
    assert task.run_facts.training_seconds == 21.0
