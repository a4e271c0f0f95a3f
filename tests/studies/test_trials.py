"""Trials that several workers take from one file."""

import json
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import optuna
import pytest
from optuna.trial import TrialState

from lightning_danube.files import locked
from lightning_danube.signals import Stopped
from lightning_danube.studies import trials
from lightning_danube.studies.design import Design
from lightning_danube.studies.trials import (
    Result,
    TrialFailed,
    Trials,
    naming_storage,
    number_of,
    open_study,
    take_turns,
)

WORKER = """
import sys
import optuna
from lightning_danube.studies.trials import take_turns
storage = optuna.storages.RDBStorage(sys.argv[1], engine_kwargs={"connect_args": {"timeout": 60}})
take_turns(storage)
study = optuna.load_study(study_name="race", storage=storage)
while (number := study._pop_waiting_trial_id()) is not None:
    print(number)
"""


@pytest.mark.medium
def test_no_trial_is_taken_twice(tmp_path: Path) -> None:
    """Without `take_turns` three workers took 46 of these 40."""
    url = f"sqlite:///{tmp_path / 'race.sqlite3'}"
    study = optuna.create_study(study_name="race", storage=url)
    for number in range(40):
        study.enqueue_trial({}, user_attrs={"number": number})
    command = [sys.executable, "-W", "ignore", "-c", WORKER, url]
    workers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    taken = [int(line) for worker in workers for line in worker.communicate(timeout=100)[0].split()]
    assert [worker.returncode for worker in workers] == [0, 0, 0]
    assert len(taken) == len(set(taken)) == 40


def test_the_recipe_is_for_any_number_of_connections(tmp_path: Path) -> None:
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'one.sqlite3'}")
    take_turns(storage)
    study = optuna.create_study(study_name="one", storage=storage)
    study.enqueue_trial({})
    assert study._pop_waiting_trial_id() is not None and study._pop_waiting_trial_id() is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("steps", 26),
        ("val_loss.web", 3.0),
        ("val_loss", 3.5),
        ("stages.finish.val_loss.web", 2.0),
        ("levels.hqq:2/64.perplexity", 40.0),
    ],
)
def test_numbers_of_a_summary(key: str, value: float) -> None:
    assert number_of(SUMMARY, key) == value


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("val_loss.news", "summary.json has no val_loss.news: at 'news' there are web, wiki"),
        ("stages.base.tokens", "at 'base' there are start, finish"),
        ("steps.web", "at 'web' there are no more"),
        ("name", "name is tiny, not a number"),
        ("stages", "stages is "),
    ],
)
def test_what_a_summary_does_not_have(key: str, message: str) -> None:
    with pytest.raises(TrialFailed, match=re.escape(message)):
        number_of(SUMMARY, key)


SUMMARY = {
    "name": "tiny",
    "steps": 26,
    "val_loss": {"web": 3.0, "wiki": 4.0},
    "stages": [{"name": "start", "val_loss": {"web": 5.0}}, {"name": "finish", "val_loss": {"web": 2.0}}],
    "levels": [{"level": "full", "perplexity": 30.0}, {"level": "hqq:2/64", "perplexity": 40.0}],
}


DESIGN = Design("rates", "base", "loss", variants={"slow": {"rate": 1}, "fast": {"rate": 2}}, seeds=(1, 2))


def trial(variant: str, seed: int, state: TrialState, **more: Any) -> Any:
    return SimpleNamespace(state=state, user_attrs={"variant": variant, "seed": seed, **more})


def results_of(*found: Any) -> list[Result]:
    trials: Any = SimpleNamespace(design=DESIGN, study=SimpleNamespace(get_trials=lambda deepcopy: found))
    return Trials.results(trials)


def test_a_complete_run_is_not_hidden_by_a_later_attempt() -> None:
    complete, failed = TrialState.COMPLETE, TrialState.FAIL
    found = results_of(
        trial("slow", 1, complete, metrics={"loss": 3.0}),
        trial("slow", 2, failed, error="no disk"),
        trial("fast", 1, failed, error="no disk"),
        trial("fast", 2, TrialState.RUNNING),
        SimpleNamespace(state=TrialState.PRUNED, user_attrs={}),
        trial("slow", 1, failed, error="no disk"),
        trial("slow", 2, complete, metrics={"loss": 2.0}),
        trial("fast", 1, TrialState.WAITING),
    )
    assert [(one.variant, one.seed, one.state, one.metrics.get("loss"), one.error) for one in found] == [
        ("slow", 1, "complete", 3.0, None),
        ("slow", 2, "complete", 2.0, None),
        ("fast", 1, "waiting", None, None),
        ("fast", 2, "running", None, None),
    ]


def test_the_time_left_is_told() -> None:
    """Ten runs of 30 s in the mean. The one that just ended still counts as running."""

    def left(*states: str) -> str:
        seconds = iter([20.0, 40.0])
        results = [
            Result("slow", n, state, {}, seconds=next(seconds) if state == "complete" else None)
            for n, state in enumerate(states)
        ]
        trials: Any = SimpleNamespace(results=lambda: results)
        return Trials._left(trials)

    assert left("complete", "complete", "running", *["waiting"] * 7) == "; 3 of 10, about 3 min 30 s left"
    assert left("complete", "complete", "running") == "" == left("running", "waiting")


def run_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: Any, versions: dict[str, float]) -> Any:
    """Runs a setting whose process leaves these versions; returns the command and what is read from the run."""
    commands = []

    def run_child(command: list[str], **where: Any) -> Any:
        commands.append(command)
        for version, loss in versions.items():
            directory = tmp_path / "runs" / ("a" if verb == "fit" else f"a-{verb}") / version
            directory.mkdir(parents=True)
            (directory / "summary.json").write_text(json.dumps({"loss": loss}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(trials, "run_child", run_child)
    runner = trials.Runner(replace(DESIGN, verb=verb), tmp_path)
    return *runner.run("a", {"rate": 3}, 7), *commands


def test_a_run_is_read_from_its_newest_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run, metrics, command = run_of(monkeypatch, tmp_path, "fit", {"version_9": 9.0, "version_10": 10.0})
    assert run.name == "version_10" and metrics == {"loss": 10.0}
    assert "--ckpt_path" not in command and command[-4:] == ["--runs", str(tmp_path / "runs"), "--name", "a"]
    assert command[command.index("--seed_everything") + 1] == "7" and command[command.index("--rate") + 1] == "3"


@pytest.mark.parametrize("verb", ["fit", "test"])
def test_only_training_goes_on_from_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verb: Literal["fit", "test"]
) -> None:
    checkpoints = tmp_path / "runs" / "a" / "version_0" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step_00000003.ckpt").touch()
    _, _, command = run_of(monkeypatch, tmp_path, verb, {"version_1": 1.0})
    assert (command[-2:] == ["--ckpt_path", "last"]) == (verb == "fit")


@pytest.mark.parametrize(("better", "direction"), [("lower", "MINIMIZE"), ("higher", "MAXIMIZE")])
def test_a_search_goes_the_way_that_is_better(
    better: Literal["lower", "higher"], direction: str, tmp_path: Path
) -> None:
    (tmp_path / "base.yaml").write_text("name: base\n")
    study = open_study(replace(DESIGN, base=str(tmp_path / "base.yaml"), better=better), tmp_path)
    assert study.direction.name == direction


def test_a_run_that_another_process_still_runs_is_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After kill -9 of a worker, its run saves. The worker that takes the trial goes on from what was saved."""
    checkpoints = tmp_path / "runs" / "a" / "version_0" / "checkpoints"

    def other_run_ends(line: str) -> None:
        assert line.startswith("the run a is in use by process ") and line.endswith(": waiting until it ends")
        checkpoints.mkdir(parents=True)
        (checkpoints / "step_00000003.ckpt").touch()
        other.close()

    monkeypatch.setattr(trials, "tell", other_run_ends)
    with ExitStack() as other:
        other.enter_context(locked(tmp_path / ".a.lock", "the run a"))
        _, _, command = run_of(monkeypatch, tmp_path, "fit", {"version_1": 1.0})
    assert command[-2:] == ["--ckpt_path", "last"]


def test_a_run_that_was_told_to_stop_is_no_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told: list[str] = []
    monkeypatch.setattr(trials, "tell", told.append)
    monkeypatch.setattr(trials, "run_child", lambda command, **_: SimpleNamespace(returncode=75))
    with pytest.raises(Stopped):
        trials.Runner(DESIGN, tmp_path).run("a", {"rate": 3}, 7)
    assert told == ["the run a was told to stop, and has saved: continue it with --resume"]


def test_a_run_keeps_its_lock_when_its_worker_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given: dict[str, Any] = {}

    def run_child(command: list[str], **options: Any) -> Any:
        given.update(options)
        given["is the lock"] = os.path.samestat(os.fstat(options["pass_fds"][0]), os.stat(tmp_path / ".a.lock"))
        return SimpleNamespace(returncode=75)

    monkeypatch.setattr(trials, "run_child", run_child)
    with pytest.raises(Stopped):
        trials.Runner(DESIGN, tmp_path).run("a", {"rate": 3}, 7)
    assert given["saves"] and given["is the lock"] and not (tmp_path / ".a.lock").exists()


# --- damage -----------------------------------------------------------------------------------------------------------


TWO = Design(name="small", base="quickstart", metric="loss", variants={"a": {}, "b": {}}, baseline="a", seeds=(1,))


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a study whose two trials are done."""
    monkeypatch.setattr(trials.Runner, "run", lambda self, name, values, seed: (tmp_path / name, {"loss": 3.25}))
    study = Trials(TWO, tmp_path)
    study.work(lambda line: None)
    assert [result.metrics for result in study.results()] == [{"loss": 3.25}] * 2
    return tmp_path


def reopened(directory: Path) -> list[Result]:
    with naming_storage(directory, None):
        study = Trials(TWO, directory, resume=True)
        study.work(lambda line: None)
        return study.results()


@pytest.mark.parametrize("harm", ["garbage", "half", "header", "directory", "pipe"])
def test_a_damaged_storage_is_named_in_one_line(finished: Path, harm: str) -> None:
    file = finished / "study.sqlite3"
    content = file.read_bytes()
    file.unlink()
    if harm == "directory":
        file.mkdir()
    elif harm == "pipe":
        os.mkfifo(file)
    else:
        file.write_bytes(
            {"garbage": b"garbage" * 99, "half": content[: len(content) // 2], "header": b"\0" + content[1:]}[harm]
        )
    with pytest.raises(ValueError, match=r"study.sqlite3 cannot be used as the storage of a study \([^\n]*\): restore"):
        reopened(finished)


def test_a_number_that_a_flipped_bit_has_changed_is_noticed(finished: Path) -> None:
    """SQLite has no checksums."""
    file = finished / "study.sqlite3"
    assert [result.metrics["loss"] for result in reopened(finished)] == [3.25, 3.25]
    content = file.read_bytes()
    assert content.count(b'"loss": 3.25') >= 2
    file.write_bytes(content.replace(b'"loss": 3.25', b'"loss": 3.05'))
    with pytest.raises(ValueError, match=r"^the result of trial \d has changed since it was stored: .* is damaged"):
        reopened(finished)


def test_an_error_of_this_project_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError), naming_storage(tmp_path, None):
        raise KeyError("a mistake of ours")
    with pytest.raises(ValueError, match="there is no study small to continue"), naming_storage(tmp_path, None):
        Trials(TWO, tmp_path, resume=True)


def test_the_password_of_a_storage_is_not_shown(tmp_path: Path) -> None:
    url = "sqlite://user:secret@/nowhere/x.sqlite3"
    with pytest.raises(ValueError, match="cannot be used as the storage") as error, naming_storage(tmp_path, url):
        Trials(TWO, tmp_path, storage=url)
    assert "secret" not in str(error.value)
