"""What a search tries, and what is read from its trials. Whole searches: tests/cli/verbs/test_study.py."""

from types import SimpleNamespace
from typing import Any

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FixedTrial, TrialState

from lightning_danube.studies.design import Design
from lightning_danube.studies.search import Search, suggested

GRID = Design("rates", "base", "loss", search={"a.rate": [1, 2], "a.rank": [4, 8]}, seeds=(1, 2))


def test_settings_are_drawn_from_what_is_described() -> None:
    trial: Any = FixedTrial({"rate": 0.01, "linear": 0.5, "layers": 3, "wide": 64, "head": "logits"})
    assert suggested(trial, "rate", {"low": 1e-3, "high": 1, "log": True}) == 0.01
    assert suggested(trial, "linear", {"low": 0.0, "high": 1}) == 0.5
    assert suggested(trial, "layers", {"low": 1, "high": 8}) == 3
    assert suggested(trial, "wide", {"low": 16, "high": 256, "log": True}) == 64
    assert suggested(trial, "head", ["hidden", "logits"]) == "logits"
    assert trial.distributions == {
        "rate": FloatDistribution(1e-3, 1.0, log=True),
        "linear": FloatDistribution(0.0, 1.0),
        "layers": IntDistribution(1, 8),
        "wide": IntDistribution(16, 256, log=True),
        "head": CategoricalDistribution(("hidden", "logits")),
    }


def trial(number: int, loss: float, state: TrialState = TrialState.COMPLETE, **params: Any) -> Any:
    by_seed = {"1": {"loss": loss}, "2": {"loss": loss + 10}}
    named = {f"a.{name}": value for name, value in params.items()}
    return SimpleNamespace(
        number=number, state=state, params=named, user_attrs={"number": number, "by_seed": by_seed}, value=loss + 5
    )


def test_marginals_are_means_over_the_other_settings() -> None:
    trials = [trial(0, 1.0, rate=1, rank=4), trial(1, 3.0, rate=1, rank=8), trial(2, 8.0, rate=2, rank=4)]
    trials.append(trial(3, 99.0, TrialState.FAIL, rate=2, rank=8))
    search: Any = SimpleNamespace(design=GRID, tried=lambda: trials)
    found = Search.marginals(search)
    assert found["a.rate"] == {1: pytest.approx([2.0, 12.0]), 2: pytest.approx([8.0, 18.0])}
    assert found["a.rank"] == {4: pytest.approx([4.5, 14.5]), 8: pytest.approx([3.0, 13.0])}


def test_the_last_attempt_of_a_setting_counts() -> None:
    failed, again = trial(0, 1.0, TrialState.FAIL), trial(0, 2.0)
    again.number = 7
    running = trial(1, 3.0, TrialState.RUNNING)
    found = [failed, running, again]
    search: Any = SimpleNamespace(design=GRID, study=SimpleNamespace(get_trials=lambda deepcopy: found))
    assert Search.tried(search) == [again]
