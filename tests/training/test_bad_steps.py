"""Which optimizer steps are bad. Whole runs: tests/callbacks/test_skipping.py."""

import json
import math
from pathlib import Path

import pytest
import torch

from lightning_danube.training.bad_steps import BadStep, BadSteps, append_record, drop_later_records, too_many_bad_steps

NAN, INF = float("nan"), float("inf")


def decide(steps: BadSteps, *losses: float, norm: float = 1.0) -> list[bool]:
    """Returns for each loss whether its step is skipped, as a run would find out."""
    skipped = []
    for step, loss in enumerate(losses, start=1):
        skipped.append(bool(steps.verdict(torch.tensor(loss), torch.tensor(norm))))
        assert steps.take(step) == 0
    return skipped


def test_a_step_is_skipped_if_loss_or_gradient_is_not_finite() -> None:
    steps = BadSteps()
    assert decide(steps, 1.0, NAN, INF, -INF, 2.0) == [False, True, True, True, False]
    causes = [(bad.step, bad.cause) for bad in steps.read()]
    assert causes == [(step, "loss is not finite") for step in (2, 3, 4)]
    assert decide(steps, 1.0, norm=INF) == [True]
    assert [bad.cause for bad in steps.read()] == ["gradient is not finite"]
    assert (steps.skipped, steps.in_a_row) == (4, 1)


def test_a_spike_is_measured_against_the_losses_that_counted() -> None:
    """The limit is the mean of the window plus a multiple of its standard deviation (n - 1)."""
    window = [1.0, 2.0, 3.0, 4.0]
    limit = 2.5 + 2 * math.sqrt(5 / 3)
    for loss, is_spike in ((limit - 0.01, False), (limit + 0.01, True)):
        steps = BadSteps(spike_deviations=2, spike_window=4)
        assert decide(steps, *window, loss) == [False] * 4 + [is_spike]
    # A spike and a loss that is not finite do not enter the window: the same loss is a spike again.
    assert decide(steps, NAN, limit + 0.01) == [True, True]
    assert [bad.cause for bad in steps.read()] == ["spike", "loss is not finite", "spike"]


def test_nothing_is_a_spike_before_the_window_is_full() -> None:
    assert decide(BadSteps(spike_deviations=1, spike_window=3), 1.0, 1.0, 99.0) == [False] * 3


def test_the_newest_decisions_can_stay_unread() -> None:
    steps = BadSteps()
    decide(steps, NAN, NAN, NAN)
    assert [bad.step for bad in steps.read(all_but=1)] == [1, 2]
    assert steps.skipped == 2
    assert [bad.step for bad in steps.read()] == [3]
    decide(steps, NAN)
    steps.forget_unread()
    assert list(steps.read()) == [] and steps.skipped == 3
    assert steps.take(9) is None  # no decision since


def test_a_checkpoint_keeps_the_window_if_it_has_the_same_length() -> None:
    before = BadSteps(spike_deviations=2, spike_window=4)
    decide(before, 1.0, 2.0, 3.0, 4.0, NAN)
    list(before.read())
    same, shorter = BadSteps(spike_deviations=2, spike_window=4), BadSteps(spike_deviations=2, spike_window=3)
    for steps, is_spike in ((same, True), (shorter, False)):
        steps.restore(before.state())
        assert (steps.skipped, steps.in_a_row) == (1, 1)
        assert decide(steps, 50.0) == [is_spike]


def test_later_records_are_dropped_and_numbers_are_json(tmp_path: Path) -> None:
    path = tmp_path / "run" / "skipped.jsonl"
    drop_later_records(path, 3)  # there is no file yet
    for step in (2, 3, 4):
        append_record(path, BadStep(step, "loss is not finite", NAN, INF), [{"row": step}])
    drop_later_records(path, 3)
    records = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [(record["step"], record["samples"]) for record in records] == [(2, [{"row": 2}]), (3, [{"row": 3}])]
    assert records[0]["loss"] == "nan" and records[0]["gradient_norm"] == "inf"


def test_the_error_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    assert str(too_many_bad_steps(3, 7, None)) == "3 optimizer steps in a row were skipped, up to step 7"
    error = too_many_bad_steps(3, 7, tmp_path)
    assert error.user_message.endswith(
        f"({tmp_path / 'skipped.jsonl'} names their samples): there is no checkpoint yet"
    )
