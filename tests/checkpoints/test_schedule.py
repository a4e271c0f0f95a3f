"""Names of checkpoints, and which of them stay. Whole runs: test_checkpoints_on_disk.py."""

import signal
import time
from datetime import timedelta
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from lightning_danube.checkpoints import SaveInterval, schedule
from lightning_danube.checkpoints.schedule import (
    CheckpointSchedule,
    RunSignals,
    StopAtStep,
    older_checkpoints,
    stage_checkpoint,
    step_checkpoint,
)
from lightning_danube.signals import SIGNALS, Stopped
from tests.ranks import on_ranks


@pytest.mark.parametrize("keep", [0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_the_newest_checkpoints_stay(tmp_path: Path, keep: int, count: int) -> None:
    paths = [step_checkpoint(tmp_path, step) for step in range(1, count + 1)]
    for path in paths:
        path.touch()
    older = older_checkpoints(tmp_path, count, keep)
    assert [path for path in paths if path not in older] == paths[max(0, count - keep) :]
    assert older == paths[: max(0, count - keep)]


def test_later_checkpoints_and_stages_do_not_count(tmp_path: Path) -> None:
    """A run that went back to step 3, because of a damaged checkpoint, does not remove step 3 for step 9."""
    for path in (*(step_checkpoint(tmp_path, step) for step in (2, 3, 9)), stage_checkpoint(tmp_path, 0, "a", 1)):
        path.touch()
    assert older_checkpoints(tmp_path, 3, keep=1) == [step_checkpoint(tmp_path, 2)]


def test_a_checkpoint_that_is_being_written_counts_if_it_is_named(tmp_path: Path) -> None:
    for step in (1, 2):
        step_checkpoint(tmp_path, step).touch()
    assert older_checkpoints(tmp_path, 3, keep=2) == []
    writing = step_checkpoint(tmp_path, 3)
    assert older_checkpoints(tmp_path, 3, keep=2, writing=writing) == [step_checkpoint(tmp_path, 1)]
    assert older_checkpoints(tmp_path, 3, keep=2, writing=stage_checkpoint(tmp_path, 0, "a", 3)) == []


def test_a_stage_is_named_by_what_a_file_may_be_called(tmp_path: Path) -> None:
    path = stage_checkpoint(tmp_path, 1, "web / high quality", 12)
    assert path == tmp_path / "stage_2_web-high-quality_step_00000012.ckpt"


def test_a_run_is_saved_at_every_nth_step() -> None:
    length = SimpleNamespace(batch_tokens=100, total_tokens=1000)
    for interval in (SaveInterval(3), SaveInterval(save_every=300), SaveInterval(save_every="21 %")):
        planned = CheckpointSchedule(interval, 2).of_run(length)
        assert [step for step in range(1, 11) if planned.is_due(step)] == [3, 6, 9], interval
    assert CheckpointSchedule(SaveInterval(), 2).of_run(length).is_due(1000)
    with pytest.raises(ValueError, match="every_n_steps is 3 and keep is 0: both must be at least 1"):
        CheckpointSchedule(SaveInterval(3), 0)
    with pytest.raises(
        ValueError, match=r"save_every is '5 %', and every_n_steps is 3: .* leave one out, or set it to null"
    ):
        SaveInterval(3, "5 %")
    with pytest.raises(ValueError, match="save_every is '500 %', more than the whole run"):
        SaveInterval(save_every="500 %")


def test_lightning_still_says_in_private_whether_it_validates_next() -> None:
    loop = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False).fit_loop
    assert loop._data_fetcher is None, "set when a fit begins"
    assert list(signature(loop.epoch_loop._should_check_val_fx).parameters) == ["data_fetcher"]


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_a_stop_waits_for_the_end_of_the_step() -> None:
    trainer: Any = SimpleNamespace(should_stop=True, accumulate_grad_batches=3)
    stop = StopAtStep()
    found = [(stop.move(trainer, batch), trainer.should_stop) for batch in (3, 4, 5)]
    assert found == [(False, False), (False, False), (True, True)]
    stop.move(trainer, 8)
    assert trainer.should_stop, "a stop at the end of a step is left alone"
    trainer.should_stop = False
    stop.move(trainer, 11)
    assert not trainer.should_stop, "a stop that was applied does not come back"


class Steps(NamedTuple):
    """Steps of a run of two ranks: rank one gets a signal before it asks at step 3."""

    at_once: tuple[int, ...]
    stops_after: int


@pytest.mark.parametrize("steps", [Steps((), 4), Steps((3,), 3), Steps((1, 2), 4)])
def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_nobody_waits_before(steps: Steps) -> None:
    def work(rank: int) -> None:
        signals = signals_of(2)
        for step in range(1, 9):
            SIGNALS.received = signal.SIGTERM if rank and step >= 3 else None
            if rank and step == 4:
                time.sleep(0.2)  # the other rank reads the vote of step 3, not that of this step
            signals.ask(at_once=step in steps.at_once)
            if signals.stop_run:
                break
        assert step == steps.stops_after
        signals.ask()  # after the end nobody waits for a vote

    on_ranks(work)


def test_a_vote_does_not_wait_for_a_rank_that_is_behind(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        signals, asked = signals_of(2), tmp_path / "asked"
        if rank:
            while not asked.exists():  # for ever, if rank zero waited for this rank's vote
                time.sleep(0.01)
        signals.ask()
        asked.touch()
        signals.ask(at_once=True)
        assert not signals.stop_run

    on_ranks(work)


@pytest.mark.parametrize("received", [None, signal.SIGTERM])
def test_one_rank_stops_at_once(received: signal.Signals | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SIGNALS, "received", received)
    signals = RunSignals()
    signals.ask()
    assert signals.stop_run == (received is not None)


def test_the_first_save_after_a_start_is_due_by_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 1000.0}
    monkeypatch.setattr(schedule.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(SIGNALS, "received", None)
    signals = RunSignals()
    found = []
    for clock["now"] in (1000.0, 1299.0, 1300.0, 1900.0):
        signals.ask()
        found.append(signals.first_save)
    assert found == [False, False, True, True]
    signals.saved = True
    signals.ask()
    assert not signals.first_save and not signals.stop_run


def test_ranks_agree_on_the_first_save_though_their_clocks_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank one's time is over before step 3: both save after step 4, once."""

    def work(rank: int) -> None:
        SIGNALS.received = None
        signals = signals_of(2)
        saves = []
        for step in range(1, 9):
            if rank and step == 3:
                signals._began -= schedule.SECONDS_TO_FIRST_SAVE
            signals.ask(at_once=step == 1)
            assert not signals.stop_run
            if signals.first_save:
                saves.append(step)
                signals.saved = True
        assert saves == [4]

    on_ranks(work)


def test_a_run_is_saved_when_the_first_save_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "SECONDS_TO_FIRST_SAVE", 0.0)
    monkeypatch.setattr(SIGNALS, "received", None)
    saved: list[str] = []
    monkeypatch.setattr(schedule, "save", lambda trainer, path, keep, *, wait: saved.append(f"{path.name} {wait}"))
    signals = RunSignals()
    for step in (1, 2, 3, 4):
        trainer: Any = SimpleNamespace(global_step=step)
        schedule.save_if_due(trainer, tmp_path, CheckpointSchedule(SaveInterval(3), 2, 3), signals, ends_here=False)
    assert saved == ["step_00000001.ckpt False", "step_00000003.ckpt False"]


def signals_of(world_size: int) -> RunSignals:
    signals = RunSignals()
    connector = SimpleNamespace(cluster_environment=None)
    strategy = SimpleNamespace(_timeout=timedelta(minutes=1))
    trainer: Any = SimpleNamespace(world_size=world_size, strategy=strategy, _accelerator_connector=connector)
    signals.hold(trainer)
    return signals


def test_the_strategies_of_several_ranks_still_keep_their_timeout_in_a_private_attribute() -> None:
    for strategy in (DDPStrategy, ModelParallelStrategy):
        assert strategy(timeout=timedelta(seconds=7))._timeout == timedelta(seconds=7)


def test_only_rank_zero_requeues_and_other_local_ranks_end_with_0(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def requeue() -> str:
        asked.append("requeue")
        return "job requeued"

    monkeypatch.setattr(schedule, "requeue_slurm_job", requeue)
    monkeypatch.setattr(SIGNALS, "received", signal.SIGUSR1)
    signals = RunSignals()
    signals._requeue = signal.SIGUSR1
    ends = []
    for global_rank, local_rank in ((0, 0), (1, 1), (2, 0)):
        trainer: Any = SimpleNamespace(global_step=7, is_global_zero=global_rank == 0, local_rank=local_rank)
        stopped = signals._stopped(trainer)
        ends.append((stopped.code, stopped.message))
    saved = "stopped after step 7, saved: resume with --ckpt_path last"
    assert ends == [(75, f"{saved}\njob requeued"), (0, ""), (75, "")] and asked == ["requeue"]


def test_a_rank_that_stops_because_of_another_takes_no_signal_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after SIGTERM to rank zero alone: the other rank would end with 130 while rank zero still saves."""
    monkeypatch.setattr(SIGNALS, "received", None)
    monkeypatch.setattr(schedule, "wait_for_checkpoint", lambda strategy: None)
    trainer: Any = SimpleNamespace(global_step=7, is_global_zero=False, local_rank=1, strategy=None)
    signals = RunSignals()
    signals.stop(trainer)  # nobody was told to stop
    signals.stop_run = True
    with pytest.raises(Stopped) as stopped:
        signals.stop(trainer)
    assert stopped.value.code == 0 and SIGNALS.received is not None
    SIGNALS._handle(signal.SIGINT, None)  # raises nothing


def test_a_run_that_has_diverged_keeps_its_checkpoints(tmp_path: Path) -> None:
    """Its weights would push out those from which it can resume. A frozen weight is not looked at: it never changes."""
    model = torch.nn.Linear(2, 2)
    saved: list[Path] = []
    trainer: Any = SimpleNamespace(
        lightning_module=model,
        global_step=8,
        save_checkpoint=saved.append,
        strategy=SimpleNamespace(reduce_boolean_decision=bool),
    )
    path = step_checkpoint(tmp_path / "checkpoints", 8)
    schedule.save(trainer, path, None, wait=False)
    assert saved == [path]
    with torch.no_grad():
        model.bias[1] = torch.inf
    with pytest.raises(ValueError, match=r"diverged: after step 8 its weights .* not saved; begin again with a lower"):
        schedule.save(trainer, path, None, wait=False)
    path.parent.mkdir()
    (last := step_checkpoint(path.parent, 4)).touch()
    with pytest.raises(ValueError, match=rf"; resume from {last} with a lower"):
        schedule.save(trainer, path, None, wait=False)
    assert saved == [path]
    model.bias.requires_grad_(False)
    schedule.save(trainer, path, None, wait=False)
    assert saved == [path, path]
