"""Trials that several workers take from one file."""

import re
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from lightning_danube.studies.trials import TrialFailed, number_of, take_turns

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
