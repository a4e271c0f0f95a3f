"""The work of a source that is dealt to tasks: where they run, their files, and what they leave.

A task reads whole files, so a source has at most as many tasks as files.
"""

from __future__ import annotations

import itertools
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning_danube.extras import need
from lightning_danube.files import naming_cached, read_json, read_sealed, write_json, write_sealed
from lightning_danube.terminal import amount
from lightning_danube.text.corpora import hub_files, local_files
from lightning_danube.text.quality import Benchmarks
from lightning_danube.text.reading import DamagedFile
from lightning_danube.tokens.engines import Executor
from lightning_danube.tokens.preparation import Preparation
from lightning_danube.tokens.shards import ShardFacts
from lightning_danube.tokens.units import Job

MOST_TASKS = 1000
"""Tasks of a source if no number is given. A stage that compares documents opens a file for each task."""
_UNITS_OF_A_TASK = 1 << 20
_NUMBERED_TASKS = 50_000
"""datatrove numbers tasks with five digits, and orders equal documents by a number of 16 bits."""
_OURS = ("array", "dependency", "error", "job-name", "output")
"""Options of sbatch that datatrove sets."""


@dataclass(frozen=True)
class Cluster:
    """Where and how the tasks run.

    Args:
        where: processes of this machine, SLURM jobs, or actors of a Ray cluster.
        tasks: most tasks of a source. A source has at most as many tasks as files. None: up to `MOST_TASKS`.
        workers: most tasks that run at once. None: no limit for SLURM and Ray.
        slurm: options of sbatch. `partition` and `time` are needed.

    Raises:
        ValueError: an option does not fit the others.
    """

    where: Executor = "local"
    tasks: int | None = None
    workers: int | None = None
    slurm: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.tasks is not None and not 1 <= self.tasks <= _NUMBERED_TASKS:
            raise ValueError(f"--tasks is {self.tasks}: give 1 to {_NUMBERED_TASKS:,}")
        if self.where != "slurm" and self.slurm:
            raise ValueError(f"--slurm is for --executor slurm, and the executor is {self.where}: leave it out")
        if self.where == "slurm":
            if missing := [key for key in ("partition", "time") if key not in self.slurm]:
                raise ValueError(f"--executor slurm needs --slurm {missing[0]}=…")
            if taken := [key for key in self.slurm if key in _OURS]:
                raise ValueError(f"--slurm {taken[0]}={self.slurm[taken[0]]}: prepare sets this option itself")
        if self.where == "ray":
            need("ray", "--executor ray")


@dataclass(frozen=True)
class SourceWork:
    """What the tasks of a source know. Each task gets a copy.

    Args:
        files: task → its files: paths, or addresses of files that a task fetches and removes again.
        began: time of the first start, in seconds since the epoch.
        meta: entries of shards.json that are known before the work.
    """

    directory: Path
    building: Path
    name: str
    path: str
    files: list[list[str]]
    began: float
    job: Job
    meta: dict[str, Any]

    @classmethod
    def begin(
        cls,
        directory: Path,
        building: Path,
        facts: ShardFacts,
        *,
        benchmarks: Benchmarks | None,
        tasks: int | None,
    ) -> SourceWork:
        """Plans the tasks, or reads the plan of an earlier start."""
        name, source = facts.name, facts.source
        preparation = Preparation(directory, facts, building=building)
        preparation.open(benchmarks)
        path = building / "plan.json"
        if not path.exists():
            files = hub_files(name, source) if source.is_hub else local_files(name, source, facts.cache_dir)
            count = min(tasks or MOST_TASKS, len(files))
            write_sealed(path, {"began": time.time(), "files": dealt(files, count)})
        plan = read_sealed(path)
        planned = len(plan["files"])
        if tasks is not None and planned != min(tasks, sum(map(len, plan["files"]))):
            raise ValueError(
                f"source {name!r} was begun with {amount(planned, 'task')}, and --tasks is {tasks}: give "
                f"--tasks {planned}, or "
                f"remove {building} to begin again"
            )
        return cls(
            directory=directory,
            building=building,
            name=name,
            path=source.path,
            files=plan["files"],
            began=plan["began"],
            job=preparation.job,
            meta={
                **facts.meta(),
                "engine": {"name": "datatrove", "version": version("datatrove"), "tasks": planned},
            },
        )

    @property
    def tasks(self) -> int:
        return len(self.files)

    def unit(self, task: int, number: int) -> int:
        assert number < _UNITS_OF_A_TASK
        return task * _UNITS_OF_A_TASK + number

    def units(self, task: int) -> Iterator[int]:
        """Yields the numbers of a task's units that are made, in order."""
        number = 0
        while self.job.path(self.unit(task, number)).exists():
            yield self.unit(task, number)
            number += 1

    def summary(self, task: int) -> Path:
        return self.building / "tasks" / f"{task:05d}.json"

    def fetched(self, task: int) -> Path:
        return self.building / "fetched" / f"{task:05d}"

    @contextmanager
    def keeping_refusal(self, task: int) -> Iterator[None]:
        """Keeps the message of an error in the texts, because the job of a cluster cannot raise it to the user."""
        try:
            yield
        except ValueError as error:
            told = {"message": str(error), "damaged": isinstance(error, DamagedFile)}
            write_json(self.building / "refusals" / f"{task:05d}.json", told)
            raise

    def raise_refusal(self) -> None:
        """Raises the first error that a task has kept. Forgets all of them, so that the next start tries again.

        Raises:
            DamagedFile: a text is damaged.
            ValueError: another error, such as a file that cannot be fetched.
        """
        kept = []
        for path in sorted((self.building / "refusals").glob("*.json")):
            with naming_cached(path):
                told = read_json(path)
                kept.append((told["message"], told["damaged"]))
        shutil.rmtree(self.building / "refusals", ignore_errors=True)
        for message, is_damaged in kept:
            raise DamagedFile(message) if is_damaged else ValueError(message)


def dealt(files: Sequence[str], tasks: int) -> list[list[str]]:
    """Deals files to tasks in blocks. So the documents of all tasks, task after task, keep the order of the source."""
    borders = [len(files) * task // tasks for task in range(tasks + 1)]
    return [list(files[begin:end]) for begin, end in itertools.pairwise(borders)]
