"""Where a run stands, asked of trainers that are made up."""

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_danube.training.position import (
    at_logged_step,
    end_of_run,
    is_done,
    replicas_of,
    speaks_for_replica,
    steps_ahead,
    tokens_done,
)


class Data:
    """Data to train on: ten steps of 100 tokens, and a few tokens that make no step."""

    vocab_size, context_length, batch_tokens, total_tokens, total_steps = 50, 10, 100, 1000, 10

    def accumulation(self, replicas: int) -> int:
        raise NotImplementedError


def trainer(**facts: Any) -> Any:
    return SimpleNamespace(datamodule=Data(), **facts)


@pytest.mark.parametrize(("world_size", "replicas"), [(8, 2), (8, 8), (8, 1), (6, 3)])
def test_one_rank_speaks_for_its_replica(world_size: int, replicas: int) -> None:
    devices = world_size // replicas
    ranks = [
        trainer(
            world_size=world_size,
            global_rank=rank,
            distributed_sampler_kwargs={"num_replicas": replicas, "rank": rank // devices},
        )
        for rank in range(world_size)
    ]
    speaking = [rank for rank, one in enumerate(ranks) if speaks_for_replica(one)]
    assert speaking == list(range(0, world_size, devices))


def test_devices_of_one_replica_have_its_number() -> None:
    one = trainer(world_size=8, global_rank=5, distributed_sampler_kwargs={"num_replicas": 4, "rank": 2})
    assert replicas_of(one) == (4, 2)
    assert replicas_of(trainer(global_rank=0, distributed_sampler_kwargs=None)) == replicas_of(None) == (1, 0)


def test_a_run_ends_with_its_data_or_at_its_last_step() -> None:
    ends = [end_of_run(trainer(max_steps=steps)) for steps in (-1, 4, 10, 99)]
    assert ends == [1000, 400, 1000, 1000]
    done = [is_done(trainer(global_step=step)) for step in (0, 9, 10)]
    assert done == [False, False, True]
    assert tokens_done(trainer(global_step=3)) == 300


def test_steps_ahead_are_told_as_far_as_the_run_goes() -> None:
    assert [steps_ahead(trainer(max_steps=steps), 2500) for steps in (-1, 0, 20, 2500, 3000)] == [
        "2,500",
        "0 of 2,500",
        "20 of 2,500",
        "2,500",
        "2,500",
    ]


def test_a_step_is_logged_at_its_last_micro_batch() -> None:
    """Three micro-batches a step; the trainer has counted the step when its last micro-batch ends."""
    logged = [
        micro_batch
        for micro_batch in range(30)
        if at_logged_step(
            trainer(accumulate_grad_batches=3, log_every_n_steps=2, global_step=(micro_batch + 1) // 3), micro_batch
        )
    ]
    assert logged == [5, 11, 17, 23, 29]
    assert not at_logged_step(trainer(accumulate_grad_batches=1, log_every_n_steps=0, global_step=4), 3)
