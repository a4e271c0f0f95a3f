"""Samplers of whole steps. With the data of a task: tests/chat/test_data.py."""

import itertools
import os
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_danube.training.loaders import (
    Prefetched,
    ResumableLoader,
    StepSampler,
    _leave_signals_to_the_trainer,
    accumulation,
    pinned,
    trains_on_gpu,
)
from lightning_danube.training.passes import Pass

PASSES = [Pass([[n] for n in range(start, start + 12)], 4) for start in (0, 12)]
LABELS = np.arange(24) + 100


def sampler(start: int, replicas: int = 2, replica: int = 1) -> StepSampler:
    return StepSampler(PASSES, LABELS, micro_batch_size=1, replicas=replicas, replica=replica, start=start)


@pytest.mark.parametrize("start", range(7))
def test_a_resumed_sampler_yields_the_rest(start: int) -> None:
    whole = [(list(rows), rows.step_labels) for rows in sampler(0)]
    assert [rows for rows, _ in whole] == [[[n]] for n in range(1, 24, 2)]
    rest = [(list(rows), rows.step_labels) for rows in sampler(start)]
    assert rest == whole[2 * start :]
    # The trainer counts the micro-batches before the resume as done.
    assert len(sampler(start)) == 12


def test_a_step_counts_the_labels_of_all_its_rows() -> None:
    assert [rows.step_labels for rows in sampler(0)][::2] == [sum(range(n, n + 4)) for n in range(100, 124, 4)]


def test_micro_batches_of_a_step() -> None:
    assert [accumulation("batch_rows", 24, *held) for held in ((24, 1), (4, 2), (1, 24), (3, 4))] == [1, 3, 1, 2]
    with pytest.raises(ValueError, match=r"batch_rows is 24, which 2 devices × .* = 5 does not divide: 20 would work"):
        accumulation("batch_rows", 24, 5, 2)


def test_signals_to_a_run_do_not_reach_its_loaders() -> None:
    """A loader process has a process group of its own, and ignores the signal by which a cluster announces the end."""
    child = os.fork()
    if not child:
        _leave_signals_to_the_trainer(0)
        own = os.getpgid(0) == os.getpid() and signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
        os._exit(0 if own else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- batches that are prepared in a thread ----------------------------------------------------------------------------


def test_items_come_in_order_and_few_are_made_ahead() -> None:
    made = []

    def items() -> Iterator[int]:
        for number in range(20):
            made.append(number)
            yield number

    ahead = Prefetched(items(), ahead=2)
    for number in range(20):
        assert next(ahead) == number
        assert len(made) <= number + 1 + 3, "two wait, and the thread holds one"
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(ahead)
    ahead._thread.join(5)
    assert not ahead._thread.is_alive()


def test_the_next_item_is_made_while_the_first_is_used() -> None:
    third = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        yield 2
        third.set()
        yield 3

    ahead = Prefetched(items())
    assert next(ahead) == 1 and third.wait(5)


def test_an_error_comes_with_the_item_that_it_stands_for() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ValueError("token 7 is not in the vocabulary")

    ahead = Prefetched(items())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="token 7 is not in the vocabulary") as error:
        next(ahead)
    assert error.traceback[-1].name == "items"
    with pytest.raises(StopIteration):
        next(ahead)


def test_the_thread_ends_when_nobody_asks_any_more() -> None:
    ahead = Prefetched(itertools.count())
    assert next(ahead) == 0
    thread = ahead._thread
    del ahead
    thread.join(5)
    assert not thread.is_alive()


class Numbers(Dataset[Any]):
    def __getitems__(self, rows: list[int]) -> dict[str, Tensor]:
        return {"rows": torch.tensor(rows)}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_for_a_gpu_yields_the_same_batches(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned_by: list[str] = []

    def pin(tensor: Tensor) -> Tensor:
        pinned_by.append(threading.current_thread().name)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    batches = [list(range(n, n + 3)) for n in range(0, 12, 3)]
    plain, ahead = (ResumableLoader(Numbers(), batches, workers, on_gpu=on) for on in (False, True))  # type: ignore[arg-type]
    assert [batch["rows"].tolist() for batch in plain] == batches and not pinned_by
    assert [batch["rows"].tolist() for batch in ahead] == batches and pinned_by == ["batches"] * 4


class Pair(NamedTuple):
    tensor: Tensor
    number: int


def test_all_tensors_of_a_batch_are_pinned_and_the_rest_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor + 1)
    zero = torch.zeros(1)
    batch = pinned({"ids": zero, "runs": Pair(zero, 3), "keys": [1, 2], "more": {"masks": zero}, "step_labels": 5})
    assert [float(one) for one in (batch["ids"], batch["runs"].tensor, batch["more"]["masks"])] == [1, 1, 1]
    assert type(batch["runs"]) is Pair and (batch["runs"].number, batch["keys"], batch["step_labels"]) == (3, [1, 2], 5)


def test_only_gpus_of_cuda_have_pinned_memory() -> None:
    def on(kind: str) -> Any:
        return SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(kind)))

    assert [trains_on_gpu(on(kind)) for kind in ("cuda", "cpu", "mps")] == [True, False, False]
    assert not trains_on_gpu(None)
