"""Which batches the ledger's callback counts, when it logs, and that a resumed run goes on counting."""

from typing import Any

import pytest

from lightning_danube.callbacks import TokenLedger
from lightning_danube.pretraining.curriculum import SampleKey
from lightning_danube.training.task import DecoderTask

WEB, WIKI = SampleKey(0, 0, 0, 0), SampleKey(0, 1, 0, 0)


def ledger(trainer: Any, task: DecoderTask) -> TokenLedger:
    made = TokenLedger()
    made.setup(trainer, task, "fit")
    return made


def step(made: TokenLedger, trainer: Any, task: DecoderTask, *batches: list[SampleKey]) -> None:
    for batch_idx, keys in enumerate(batches):
        trainer.global_step += batch_idx + 1 == len(batches)
        made.on_train_batch_end(trainer, task, None, {"keys": keys}, batch_idx)


def seen(task: DecoderTask) -> list[dict[str, int]]:
    assert task.run_facts.tokens_by_source is not None
    return task.run_facts.tokens_by_source()


def test_a_step_is_logged_once_with_all_its_micro_batches(trainer: Any, task: DecoderTask) -> None:
    step(ledger(trainer, task), trainer, task, [WEB, WEB], [WEB, WIKI])
    assert trainer.loggers[0].rows == [
        (1, {"mix/web": 0.75, "mix/wiki": 0.25, "tokens_seen/web": 24.0, "tokens_seen/wiki": 8.0})
    ]
    assert seen(task) == [{"web": 24, "wiki": 8}, {"web": 0, "wiki": 0}]


@pytest.mark.parametrize("rank", range(4))
def test_of_ranks_that_share_rows_one_counts_them(
    rank: int, trainer: Any, task: DecoderTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four ranks in two replicas: ranks 0 and 1 have the same rows, and 2 and 3."""
    trainer.world_size, trainer.global_rank, trainer.is_global_zero = 4, rank, rank == 0
    trainer.distributed_sampler_kwargs = {"num_replicas": 2, "rank": rank // 2}
    monkeypatch.setattr("torch.distributed.all_reduce", lambda counts: None)
    step(ledger(trainer, task), trainer, task, [WEB], [WIKI])
    assert seen(task)[0] == ({"web": 8, "wiki": 8} if rank in (0, 2) else {"web": 0, "wiki": 0})


def test_counts_of_all_ranks_are_added(trainer: Any, task: DecoderTask, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer.world_size = 2
    trainer.distributed_sampler_kwargs = {"num_replicas": 2, "rank": 0}
    monkeypatch.setattr("torch.distributed.all_reduce", lambda counts: counts.mul_(2))
    step(ledger(trainer, task), trainer, task, [WEB], [WIKI])
    assert seen(task)[0] == {"web": 16, "wiki": 16}


def test_a_resumed_run_goes_on_counting(trainer: Any, task: DecoderTask) -> None:
    before = ledger(trainer, task)
    step(before, trainer, task, [WEB, WEB], [WEB, WIKI])
    checkpoint: dict[str, Any] = {}
    before.on_save_checkpoint(trainer, task, checkpoint)
    after = ledger(trainer, task)
    after.on_load_checkpoint(trainer, task, checkpoint)
    step(after, trainer, task, [WIKI], [WIKI])
    assert seen(task)[0] == {"web": 24, "wiki": 24}
    assert trainer.loggers[0].rows[-1][1]["mix/wiki"] == 1.0
    after.on_load_checkpoint(trainer, task, {})  # a checkpoint without a ledger changes nothing
    assert seen(task)[0] == {"web": 24, "wiki": 24}


def test_an_evaluation_needs_no_curriculum(trainer: Any, task: DecoderTask) -> None:
    del trainer.datamodule.curriculum
    TokenLedger().setup(trainer, task, "validate")
    assert task.run_facts.tokens_by_source is None
