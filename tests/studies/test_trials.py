"""Trials that several workers take from one file."""

import subprocess
import sys
from pathlib import Path

import optuna

from lightning_danube.studies.trials import take_turns

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
