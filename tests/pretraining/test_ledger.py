"""The ledger counts samples by stage and source, over all ranks and sessions."""

import pytest
import torch
from torch import Tensor

from lightning_danube.pretraining.curriculum import Curriculum, SampleKey, Stage
from lightning_danube.pretraining.ledger import SampleLedger


def curriculum(*stages: str, sources: tuple[str, ...] = ("web", "wiki")) -> Curriculum:
    mix = {name: 1.0 for name in sources}
    return Curriculum(
        [Stage(name, 4096, mix) for name in stages], {name: 100 for name in sources},
        context_length=64, batch_samples=8, seed=0,
    )  # fmt: skip


def alone(counts: Tensor) -> Tensor:
    return counts


def key(stage: int, source: int) -> SampleKey:
    return SampleKey(stage, source, 0, 0)


def test_tokens_are_counted_by_stage_and_source() -> None:
    ledger = SampleLedger(curriculum("a", "b"), alone)
    ledger.add([key(0, 0), key(0, 1), key(0, 1)])
    ledger.add([key(1, 1)])
    assert ledger.tokens_by_source() == [{"web": 64, "wiki": 128}, {"web": 0, "wiki": 64}]
    assert ledger.tokens_by_source() == [{"web": 64, "wiki": 128}, {"web": 0, "wiki": 64}]  # nothing counts twice


def test_ranks_are_added() -> None:
    def two_alike(counts: Tensor) -> Tensor:
        return 2 * counts

    ledger = SampleLedger(curriculum("a"), two_alike)
    ledger.add([key(0, 0)])
    assert ledger.samples().tolist() == [[2, 0]]


def test_shares_are_those_since_the_last_log() -> None:
    ledger = SampleLedger(curriculum("a"), alone)
    ledger.add([key(0, 0), key(0, 0), key(0, 0), key(0, 1)])
    assert ledger.values_to_log() == {
        "mix/web": 0.75, "mix/wiki": 0.25, "tokens_seen/web": 192.0, "tokens_seen/wiki": 64.0,
    }  # fmt: skip
    ledger.add([key(0, 1)])
    assert ledger.values_to_log() == {
        "mix/web": 0.0, "mix/wiki": 1.0, "tokens_seen/web": 192.0, "tokens_seen/wiki": 128.0,
    }  # fmt: skip


def test_a_checkpoint_is_read_by_name() -> None:
    """A changed config may add a stage, and a source that stands before the others."""
    before = SampleLedger(curriculum("a"), alone)
    before.add([key(0, 0), key(0, 1), key(0, 1)])
    before.values_to_log()
    after = SampleLedger(curriculum("a", "b", sources=("code", "web", "wiki")), alone)
    after.add([key(1, 0)])  # before the checkpoint is loaded: forgotten
    after.restore(before.state())
    assert after.samples().tolist() == [[0, 1, 2], [0, 0, 0]]
    after.add([key(1, 0)])
    assert after.values_to_log()["mix/code"] == 1.0


def test_a_name_that_is_gone_is_refused() -> None:
    before = SampleLedger(curriculum("a"), alone)
    before.add([key(0, 1)])
    for other in (curriculum("b"), curriculum("a", sources=("web",))):
        message = r"the checkpoint counted tokens of source 'wiki' in stage 'a'.* keeps its name"
        with pytest.raises(ValueError, match=message):
            SampleLedger(other, alone).restore(before.state())
    # Names that were not counted may go.
    after = SampleLedger(curriculum("a", sources=("wiki",)), alone)
    after.restore(before.state())
    assert torch.equal(after.samples(), torch.tensor([[1]]))


def test_ranks_are_added_once_however_often_the_sum_is_asked_for() -> None:
    def two_alike(counts: Tensor) -> Tensor:
        return 2 * counts

    ledger = SampleLedger(curriculum("a"), two_alike)
    ledger.add([key(0, 0)])
    assert [ledger.samples().tolist() for _ in range(3)] == [[[2, 0]]] * 3
    resumed = SampleLedger(curriculum("a"), two_alike)
    resumed.restore(ledger.state())
    resumed.add([key(0, 1)])
    assert resumed.samples().tolist() == [[2, 2]]


def test_a_saved_state_does_not_grow_with_the_run() -> None:
    ledger = SampleLedger(curriculum("a"), alone)
    ledger.add([key(0, 0)])
    state = ledger.state()
    ledger.add([key(0, 0)])
    ledger.values_to_log()
    assert state["samples"].tolist() == [[1, 0]] and state["logged"] == {"web": 0, "wiki": 0}


def test_shares_after_a_resume_are_those_since_the_last_logged_step() -> None:
    before = SampleLedger(curriculum("a"), alone)
    before.add([key(0, 0)] * 3)
    before.values_to_log()
    before.add([key(0, 1)])
    after = SampleLedger(curriculum("a"), alone)
    after.restore(before.state())
    after.add([key(0, 0)] * 3)
    assert after.values_to_log() == {
        "mix/web": 0.75, "mix/wiki": 0.25, "tokens_seen/web": 384.0, "tokens_seen/wiki": 64.0,
    }  # fmt: skip
