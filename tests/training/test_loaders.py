"""Samplers of whole steps. With the data of a task: tests/chat/test_data.py."""

import os
import signal

import numpy as np
import pytest

from lightning_danube.training.loaders import StepSampler, _leave_signals_to_the_trainer, accumulation
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
    with pytest.raises(ValueError, match=r"batch_rows is 24, which 2 device\(s\) × .* 5 do not divide: 20 would work"):
        accumulation("batch_rows", 24, 5, 2)


def test_signals_to_a_run_do_not_reach_its_loaders() -> None:
    """A loader process has a process group of its own, and ignores the signal by which a cluster announces the end."""
    child = os.fork()
    if not child:
        _leave_signals_to_the_trainer(0)
        own = os.getpgid(0) == os.getpid() and signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
        os._exit(0 if own else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
