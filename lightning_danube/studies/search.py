"""Searches settings on a grid or with Optuna's TPE sampler (Bergstra et al. 2011), and rates their importance."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from lightning_danube.signals import Stopped
from lightning_danube.studies.design import Design
from lightning_danube.studies.trials import (
    POLL_SECONDS,
    Runner,
    TrialFailed,
    check_digest,
    digest_of,
    minutes_of,
    open_study,
)

DONE = (TrialState.COMPLETE, TrialState.FAIL)


class Search:
    """Trials of settings that the sampler chooses from earlier results; arguments as for `open_study`.

    The value of a trial is the mean of the metric over the seeds.
    """

    def __init__(self, design: Design, directory: Path, *, storage: str | None = None, resume: bool = False) -> None:
        self.design, self.runner = design, Runner(design, directory)
        # The sampler treats trials that run elsewhere as bad, so it does not try their settings in parallel.
        sampler = optuna.samplers.TPESampler(seed=design.seeds[0], multivariate=True, constant_liar=True)
        self.study = open_study(design, directory, storage=storage, resume=resume, sampler=sampler)
        planned = {
            json.dumps(trial.system_attrs.get("fixed_params")) for trial in self.study.get_trials(deepcopy=False)
        }
        for number, values in enumerate(design.grid()):
            if json.dumps(values) not in planned:
                self.study.enqueue_trial(values, user_attrs={"number": number})

    def work(self, tell: Callable[[str], None]) -> None:
        """Tries settings until the study's number is reached. Tries dropped settings again."""
        while True:
            optuna.storages.fail_stale_trials(self.study)
            states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
            running, waiting = states.count(TrialState.RUNNING), TrialState.WAITING in states
            if waiting or len(self.tried()) + running < self.design.settings:
                self.study.optimize(lambda trial: self._run(trial, tell), n_trials=1, catch=(TrialFailed,))
            elif running:
                time.sleep(POLL_SECONDS)
            else:
                return

    def _run(self, trial: optuna.Trial, tell: Callable[[str], None]) -> float:
        values = {key: suggested(trial, key, among) for key, among in self.design.search.items()}
        # A retry keeps the number, so that it continues the runs of the first attempt.
        number = trial.user_attrs.get("number", trial.number)
        trial.set_user_attr("number", number)
        shown = ", ".join(f"{key.rpartition('.')[2]} {shown_value(value)}" for key, value in values.items())
        tell(f"trial {number}: {shown}")
        begin = time.monotonic()
        found: list[dict[str, float]] = []
        try:
            for seed in self.design.seeds:
                _, metrics = self.runner.run(f"trial{number}-seed{seed}", values, seed)
                found.append(metrics)
        except (KeyboardInterrupt, Stopped) as stop:
            self.study.enqueue_trial(trial.params, user_attrs={"number": number})
            raise KeyboardInterrupt from stop  # the exception that Optuna records
        except TrialFailed as error:
            trial.set_user_attr("error", str(error))
            tell(f"trial {number}: failed: {error}")
            raise
        means = {key: sum(one[key] for one in found) / len(found) for key in found[0]}
        trial.set_user_attr("metrics", means)
        trial.set_user_attr("by_seed", dict(zip(map(str, self.design.seeds), found, strict=True)))
        seconds = time.monotonic() - begin
        for key, known in {"seconds": round(seconds, 1), **self.runner.provenance}.items():
            trial.set_user_attr(key, known)
        trial.set_user_attr("digest", digest_of(trial.user_attrs))
        value = means[self.design.metric]
        tell(f"trial {number}: {self.design.metric} {value:.4f}, {minutes_of(seconds)}; {self._progress()}")
        return value

    def _progress(self) -> str:
        done = [trial.user_attrs["seconds"] for trial in self.tried() if "seconds" in trial.user_attrs]
        left = self.design.settings - len(self.tried()) - 1
        if left <= 0 or not done:
            return f"{len(self.tried()) + 1} of {self.design.settings}"
        time_left = minutes_of(left * sum(done) / len(done))
        return f"{len(self.tried()) + 1} of {self.design.settings}, about {time_left} left"

    def tried(self) -> list[FrozenTrial]:
        """Returns the last finished attempt of each setting."""
        last: dict[int, FrozenTrial] = {}
        for trial in self.study.get_trials(deepcopy=False):
            check_digest(trial)
            last[trial.user_attrs.get("number", trial.number)] = trial
        return [trial for trial in last.values() if trial.state in DONE]

    def retry_failed(self) -> int:
        """Returns failed trials to the queue. Returns how many."""
        failed = [trial for trial in self.tried() if trial.state == TrialState.FAIL]
        for trial in failed:
            self.study.enqueue_trial(trial.params, user_attrs={"number": trial.user_attrs["number"]})
        return len(failed)

    def marginals(self) -> dict[str, dict[Any, list[float]]]:
        """Returns for a grid: setting → value → the metric for each seed, averaged over all other settings."""
        complete = [trial for trial in self.tried() if trial.state == TrialState.COMPLETE]
        found: dict[str, dict[Any, list[float]]] = {}
        for key, values in self.design.search.items() if self.design.grid() else ():
            for value in values:
                ours = [trial.user_attrs["by_seed"] for trial in complete if trial.params[key] == value]
                found.setdefault(key, {})[value] = [
                    sum(by_seed[str(seed)][self.design.metric] for by_seed in ours) / len(ours)
                    for seed in self.design.seeds
                    if ours
                ]
        return found

    def importances(self) -> dict[str, float]:
        """Returns setting → share of the variance between trials that it explains (fANOVA; Hutter et al. 2014); empty
        if there are too few trials."""
        complete = [trial for trial in self.tried() if trial.state == TrialState.COMPLETE]
        if len(complete) < 4 or len({trial.value for trial in complete}) < 2:
            return {}
        # Named, and with a seed: the default depends on Optuna's version, and its forest would differ each time.
        fanova = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(self.study, evaluator=fanova)
        return {key: float(share) for key, share in shares.items()}


def suggested(trial: optuna.Trial, key: str, among: Any) -> Any:
    """Returns a value of a setting, which the sampler chooses from the study's description."""
    if isinstance(among, list):
        return trial.suggest_categorical(key, among)
    low, high, log = among["low"], among["high"], bool(among.get("log", False))
    if isinstance(low, int) and isinstance(high, int):
        return trial.suggest_int(key, low, high, log=log)
    return trial.suggest_float(key, float(low), float(high), log=log)


def shown_value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
