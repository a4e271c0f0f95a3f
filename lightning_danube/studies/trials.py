"""The trials of a study, stored and distributed by Optuna. Each trial is an ordinary run in a separate process.

When the study begins, all trials are written into the storage as waiting; a worker takes the next waiting trial. When a
worker dies, its heartbeat stops, and its trial waits again. The run of a worker that dies saves and ends, and holds a
lock until then. So a study can be stopped and continued at any time.
Several workers can share it, on several machines if they share the storage.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import alembic
import optuna
import sqlalchemy
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import event

from lightning_danube.checkpoints.runs import newest_checkpoint
from lightning_danube.files import locked, read_json
from lightning_danube.signals import EXIT_STOPPED, Stopped, run_child
from lightning_danube.studies.design import Design, Overrides
from lightning_danube.studies.facts import command_of
from lightning_danube.terminal import tell
from lightning_danube.training.history import commit, machine

HEARTBEAT_SECONDS = 5
GRACE_SECONDS = 20
RETRIES = 3
POLL_SECONDS = 1.0
DAMAGED = "the study's storage is damaged; restore it from a copy, or move it away and begin again (the runs stay)"

optuna.logging.set_verbosity(optuna.logging.ERROR)
logging.getLogger("alembic").setLevel(logging.WARNING)
# Optuna has called the heartbeat experimental since 2021.
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)


@dataclass(frozen=True)
class Result:
    """One run of one variant.

    Args:
        state: "waiting", "running", "complete" or "failed".
        metrics: key of `summary.json` → number.
        error: the last line that a failed run wrote.
        run: directory of the run.
        seconds: duration of the run.
        commit, machine: commit and machine of the run.
    """

    variant: str
    seed: int
    state: str
    metrics: dict[str, float]
    error: str | None = None
    run: str | None = None
    seconds: float | None = None
    commit: str | None = None
    machine: str | None = None


class TrialFailed(Exception):
    """A run ended with an error, which is stored with its trial."""


@contextmanager
def naming_storage(directory: Path, storage: str | None) -> Iterator[None]:
    """Turns whatever Optuna and the database raise on damaged or foreign content into one line.

    Args:
        directory: directory of the study.
        storage: the URL of its storage, or None for the file in `directory`.

    Raises:
        ValueError: an exception of theirs left the block; names the storage.
    """
    theirs = tuple(str(Path(str(module.__file__)).parent) for module in (optuna, sqlalchemy, alembic))
    try:
        yield
    except (TrialFailed, OSError):
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not any(frame.filename.startswith(theirs) for frame in frames) or _is_ours(error, frames[-1].filename):
            raise
        said = " ".join(str(error).partition("\n")[0].split())[:200] or type(error).__name__
        shown: Path | str
        if storage is None:
            shown = directory / "study.sqlite3"
            way_out = "restore the file from a copy, or move it away and begin the study again; its runs stay"
        else:
            shown = re.sub(r"//[^@/]*@", "//", storage)
            way_out = "see that the database is there, and is Optuna's"
        raise ValueError(f"{shown} cannot be used as the storage of a study ({said}): {way_out}") from error


def _is_ours(error: Exception, raised_in: str) -> bool:
    return isinstance(error, ValueError) and Path(raised_in).is_relative_to(Path(__file__).resolve().parents[1])


def open_study(
    design: Design,
    directory: Path,
    *,
    storage: str | None = None,
    resume: bool = False,
    sampler: optuna.samplers.BaseSampler | None = None,
) -> optuna.Study:
    """Returns Optuna's record of a study.

    Args:
        directory: directory of the study's runs, and of its storage if no `storage` is given.
        storage: a URL that Optuna knows, for workers on several machines; a file in `directory` if not given.
        resume: whether to continue or join a study that was begun before.
        sampler: chooses the settings that a search tries.

    Raises:
        ValueError: the study exists without `resume`, does not exist with `resume`, or has changed.
    """
    url = storage or f"sqlite:///{directory / 'study.sqlite3'}"
    begun = storage is not None or (directory / "study.sqlite3").exists()
    shown = url.removeprefix("sqlite:///")
    nothing = f"there is no study {design.name} to continue in {shown}: leave out --resume"
    if resume and not begun:
        raise ValueError(nothing)
    directory.mkdir(parents=True, exist_ok=True)
    kept = RDBStorage(
        url,
        engine_kwargs={"connect_args": {"timeout": 60}} if url.startswith("sqlite") else None,
        heartbeat_interval=HEARTBEAT_SECONDS,
        grace_period=GRACE_SECONDS,
        heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
    )
    if url.startswith("sqlite"):
        take_turns(kept)
    names = optuna.get_all_study_names(kept) if begun else []
    if design.name in names and not resume:
        raise ValueError(
            f"the study {design.name} was begun, in {shown}: continue it with --resume, or give the new one another "
            "name"
        )
    if design.name not in names and resume:
        raise ValueError(nothing)
    direction = StudyDirection.MINIMIZE if design.better == "lower" else StudyDirection.MAXIMIZE
    study = optuna.create_study(
        storage=kept, study_name=design.name, direction=direction, load_if_exists=True, sampler=sampler
    )
    check_identity(study, design)
    return study


def check_identity(study: optuna.Study, design: Design) -> None:
    """Checks that all results of one table come from equal settings. New variants may be added.

    Raises:
        ValueError: a variant or a setting has changed.
    """
    digest = design.digest()
    before = study.user_attrs.get("identity", {"digest": digest, "variants": {}})
    variants = {name: dict(values) for name, values in design.variants.items()}
    changed = [name for name, values in variants.items() if before["variants"].get(name, values) != values]
    if before["digest"] != digest or changed:
        what = ", ".join(changed) if changed else "the base, the metric, the search or what all variants set"
        raise ValueError(
            f"the study {design.name} was begun otherwise ({what}): set that back, or give this one another name"
        )
    study.set_user_attr("identity", {"digest": digest, "variants": {**before["variants"], **variants}})


class Runner:
    """Runs the runs of a study in separate processes, below its directory."""

    def __init__(self, design: Design, directory: Path) -> None:
        self.design, self.directory = design, directory
        self.provenance = {"commit": commit(), "machine": machine()}

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def run(self, name: str, values: Overrides, seed: int) -> tuple[Path, dict[str, float]]:
        """Runs one setting, and returns the run's directory and the study's metrics.

        Waits if another process still runs it: after a kill of its worker, a run saves and ends.

        Raises:
            TrialFailed: the run failed, or its summary lacks a metric.
            Stopped: the run was told to stop.
        """
        # The run keeps the lock if this process is killed.
        with locked(self.directory / f".{name}.lock", f"the run {name}", wait=tell) as lock:
            return self._run(name, values, seed, lock)

    def _run(self, name: str, values: Overrides, seed: int, lock: int) -> tuple[Path, dict[str, float]]:
        runs = self.directory / "runs"
        place = ["--runs", str(runs), "--name", name]
        trained, verb, log = runs / name, self.design.verb, self.log(name)
        if verb == "fit" and any(newest_checkpoint(version) for version in trained.glob("version_*")):
            place += ["--ckpt_path", "last"]
        with log.open("a") as file:
            command = command_of(self.design, values, seed, *place)
            done = run_child(command, saves=True, stdout=file, stderr=subprocess.STDOUT, pass_fds=[lock])
        if done.returncode == EXIT_STOPPED:
            tell(f"the run {name} was told to stop, and has saved: continue it with --resume")
            raise Stopped("")
        if done.returncode:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            raise TrialFailed((lines or ["no reason given"])[-1].removeprefix("error: ")[:300])
        where = trained if verb == "fit" else runs / f"{name}-{verb}"
        run = max(where.glob("version_*"), key=lambda path: int(path.name.split("_")[1]))
        summary = read_json(run / "summary.json")
        return run, {key: number_of(summary, key) for key in self.design.metrics}


class Trials:
    """The trials of a study of variants, one for each variant and seed; arguments as for `open_study`."""

    def __init__(self, design: Design, directory: Path, *, storage: str | None = None, resume: bool = False) -> None:
        self.design, self.runner = design, Runner(design, directory)
        self.study = open_study(design, directory, storage=storage, resume=resume)
        planned = {_key(trial) for trial in self.study.get_trials(deepcopy=False)}
        for seed in design.seeds:
            for variant in design.variants:
                if (variant, seed) not in planned:
                    self._plan(variant, seed)

    def _plan(self, variant: str, seed: int) -> None:
        # Trials have no Optuna parameters, because Optuna would need all their values from the first trial on.
        self.study.enqueue_trial({}, user_attrs={"variant": variant, "seed": seed})

    def retry_failed(self) -> int:
        """Returns failed trials to the queue. Returns how many."""
        failed = [result for result in self.results() if result.state == "failed"]
        for result in failed:
            self._plan(result.variant, result.seed)
        return len(failed)

    # --- working ------------------------------------------------------------------------------------------------------

    def work(self, tell: Callable[[str], None]) -> None:
        """Takes trials until none is left, including trials that another worker dropped."""
        while True:
            optuna.storages.fail_stale_trials(self.study)
            states = [trial.state for trial in self.study.get_trials(deepcopy=False)]
            if TrialState.WAITING in states:
                self.study.optimize(lambda trial: self._run(trial, tell), n_trials=1, catch=(TrialFailed,))
            elif TrialState.RUNNING in states:
                time.sleep(POLL_SECONDS)
            else:
                return

    def _run(self, trial: optuna.Trial, tell: Callable[[str], None]) -> float:
        if "variant" not in trial.user_attrs:
            # Another worker took the last trial in the meantime.
            raise optuna.TrialPruned
        variant, seed = trial.user_attrs["variant"], trial.user_attrs["seed"]
        name = f"{variant}-seed{seed}"
        tell(f"{name}: begins")
        begin = time.monotonic()
        try:
            run, metrics = self.runner.run(name, self.design.variants[variant], seed)
        except (KeyboardInterrupt, Stopped) as stop:
            self._plan(variant, seed)
            raise KeyboardInterrupt from stop  # the exception that Optuna records
        except TrialFailed as error:
            trial.set_user_attr("error", str(error))
            tell(f"{name}: failed: {error} (all of it: {self.runner.log(name)})")
            raise
        seconds = time.monotonic() - begin
        known = {"metrics": metrics, "run": str(run), "seconds": round(seconds, 1), **self.runner.provenance}
        for key, value in known.items():
            trial.set_user_attr(key, value)
        trial.set_user_attr("digest", digest_of(trial.user_attrs))
        value = metrics[self.design.metric]
        tell(f"{name}: {self.design.metric} {value:.4f}, {minutes_of(seconds)}{self._left()}")
        return value

    def _left(self) -> str:
        """Returns the progress over the trials, and the estimated time for the remaining trials."""
        results = self.results()
        done = [result.seconds for result in results if result.seconds is not None]
        left = sum(result.state in ("waiting", "running") for result in results) - 1
        if left <= 0 or not done:
            return ""
        return f"; {len(results) - left} of {len(results)}, about {minutes_of(left * sum(done) / len(done))} left"

    # --- results ------------------------------------------------------------------------------------------------------

    def results(self) -> list[Result]:
        """Returns the latest result of each run, in the order of variants and seeds."""
        latest: dict[tuple[str, int], FrozenTrial] = {}
        for trial in self.study.get_trials(deepcopy=False):
            key = _key(trial)
            if key is not None and (key not in latest or latest[key].state != TrialState.COMPLETE):
                latest[key] = trial
        names = {
            TrialState.WAITING: "waiting",
            TrialState.RUNNING: "running",
            TrialState.COMPLETE: "complete",
            TrialState.FAIL: "failed",
        }
        found = []
        for variant in self.design.variants:
            for seed in self.design.seeds:
                if (variant, seed) not in latest or latest[variant, seed].state not in names:
                    raise ValueError(f"{variant} with seed {seed} is missing: {DAMAGED}")
                trial = latest[variant, seed]
                attributes = trial.user_attrs
                check_digest(trial)
                found.append(
                    Result(
                        variant,
                        seed,
                        names[trial.state],
                        attributes.get("metrics", {}),
                        attributes.get("error"),
                        attributes.get("run"),
                        attributes.get("seconds"),
                        attributes.get("commit"),
                        attributes.get("machine"),
                    )
                )
        return found


def take_turns(storage: RDBStorage) -> None:
    """Makes each transaction lock the SQLite file from its first statement on.

    Optuna takes a waiting trial by reading and then writing, and asks the database to lock the row in between. SQLite
    has no row locks, so two workers would take the same trial. (The events follow SQLAlchemy's own recipe.)
    """

    @event.listens_for(storage.engine, "connect")
    def leave_transactions_to_us(connection: Any, record: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(storage.engine, "begin")
    def begin_as_a_writer(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    # Connections that were made before do not have these events.
    storage.engine.dispose()


def number_of(summary: dict[str, Any], key: str) -> float:
    """Returns a number of a run's summary by its dotted key, such as val_loss.web or levels.gguf:Q8_0.perplexity.

    If the key holds several numbers, such as the loss of each source, returns their mean. In a list of mappings, a part
    of the key selects the mapping with that first value.

    Raises:
        TrialFailed: the summary has no such number; the message lists its keys.
    """
    value: Any = summary
    for part in key.split("."):
        if isinstance(value, list):
            value = {str(next(iter(one.values()))): one for one in value if isinstance(one, dict) and one}
        if not isinstance(value, dict) or part not in value:
            there = ", ".join(value) if isinstance(value, dict) else "no more"
            raise TrialFailed(f"summary.json has no {key}: at {part!r} there are {there}")
        value = value[part]
    if isinstance(value, dict) and value:
        return sum(number_of(summary, f"{key}.{name}") for name in value) / len(value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TrialFailed(f"summary.json: {key} is {str(value)[:60]}, not a number")
    return float(value)


def _key(trial: FrozenTrial) -> tuple[str, int] | None:
    attributes = trial.user_attrs
    return (attributes["variant"], attributes["seed"]) if {"variant", "seed"} <= attributes.keys() else None


def digest_of(attributes: Mapping[str, Any]) -> str:
    """Returns a hash of a trial's result. SQLite's file has no checksums: a flipped bit would change a number."""
    kept = {key: attributes.get(key) for key in ("variant", "seed", "number", "metrics", "by_seed")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def check_digest(trial: FrozenTrial) -> None:
    """
    Raises:
        ValueError: the result of a complete trial is not what was stored. Older storages have no digest.
    """
    digest = trial.user_attrs.get("digest")
    if trial.state == TrialState.COMPLETE and digest is not None and digest != digest_of(trial.user_attrs):
        raise ValueError(f"the result of trial {trial.number} has changed since it was stored: {DAMAGED}")


def minutes_of(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
