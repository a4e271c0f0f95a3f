"""Prepares token shards with datatrove: its executors, completion markers and deduplication. Only this file imports it.

A key of the configuration means the same as without datatrove, because `make_unit` reads, filters, decontaminates and
encodes the rows. datatrove deals the tasks to processes, SLURM jobs or Ray actors, marks the finished tasks, and finds
duplicates with memory that does not grow with the corpus. A source passes through stages, each a datatrove pipeline:

    read       N tasks     rows become units; hashes or sketches of the documents are written for the next stage
    exact      T tasks     finds documents with equal hashes                        (deduplicate: exact)
    buckets    16 K tasks  finds sketches that agree in a band                      (deduplicate: near)
    clusters   1 task      joins the pairs to clusters and keeps one document each  (deduplicate: near)
    write      N tasks     writes the units that lose documents again, without them
    join       1 task      writes shards.json and report.json, and names the directory

What a task writes does not depend on when or where it runs. After a kill, a stage continues with the tasks that have
no completion marker.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_danube.extras import need
from lightning_danube.files import finish_folder, locked, new_file, read_sealed, write_json, write_sealed
from lightning_danube.terminal import amount, counted, tell
from lightning_danube.text.corpora import Source, is_saved_dataset
from lightning_danube.text.quality import BANDS, PERMUTATIONS, Benchmarks, Quality
from lightning_danube.text.reading import BadRow, DamagedFile, Span, spans
from lightning_danube.text.worker_pool import WorkerPool
from lightning_danube.tokens.engines.source_work import MOST_TASKS, Cluster, SourceWork
from lightning_danube.tokens.finished_shards import fetch_listing, is_finished
from lightning_danube.tokens.hub import first_line
from lightning_danube.tokens.preparation import SHOWN_REJECTIONS, contamination, link_or_copy, nothing_left
from lightning_danube.tokens.shards import SPLITS, ShardFacts, joined_splits
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from lightning_danube.tokens.units import kept_splits, load_part, load_unit, make_unit, write_kept

try:
    from datatrove.data import Document as TroveDocument
    from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
    from datatrove.executor.base import PipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.dedup.exact_dedup import (
        ExactDedupConfig,
        ExactDedupFilter,
        ExactDedupSignature,
        ExactFindDedups,
    )
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig,
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
    )
    from datatrove.utils.hashing import HashConfig
    from datatrove.utils.jobs import get_running_slurm_jobs
    from datatrove.utils.logging import setup_default_logger
except ModuleNotFoundError:
    need("datatrove", "prepare --engine datatrove")
    raise

TASK_UNIT_BYTES = 1 << 30
"""Bytes of text of a unit. A unit becomes one file of each split."""
_EXACT_TASKS = 64


def prepare_with_datatrove(
    sources: Mapping[str, Source],
    tokenizer: DocumentTokenizer,
    *,
    held_out: float,
    quality: Quality,
    cache_dir: Path,
    cluster: Cluster,
) -> dict[str, float]:
    """Makes the missing shards of all sources. Returns source → seconds, 0 for shards that existed or are not complete.

    With SLURM, submits the jobs and returns. The next call reports what they left, or submits what is missing.

    Raises:
        ValueError: a source asks for something that this engine does not do, cannot be read, or holds no text.
    """
    for name, source in sources.items():
        _check(name, source)
    seconds = dict.fromkeys(sources, 0.0)
    benchmarks: Benchmarks | None = None
    for name, source in sources.items():
        if is_finished(source.path):
            began = time.monotonic()
            fetch_listing(name, source.path, cache_dir)
            seconds[name] = time.monotonic() - began
            continue
        facts = ShardFacts(name, source, tokenizer, held_out, quality, cache_dir)
        directory = facts.directory()
        if not (directory / "shards.json").exists():
            directory = facts.directory("datatrove")
        building = _working_directory(directory)
        lock = directory.with_name(f".{directory.name}.lock")
        with locked(lock, f"source {name!r} ({lock})", wait=tell):
            if not (directory / "shards.json").exists():
                if quality.decontaminate and benchmarks is None:
                    benchmarks = Benchmarks.read(quality.decontaminate)
                began = time.monotonic()
                work = SourceWork.begin(directory, building, facts, benchmarks=benchmarks, tasks=cluster.tasks)
                _run(work, quality, cluster)
                if (directory / "shards.json").exists():
                    seconds[name] = time.monotonic() - began
            if (directory / "shards.json").exists():
                shutil.rmtree(building, ignore_errors=True)
    return seconds


def _working_directory(directory: Path) -> Path:
    """Returns the directory of a source's units, of what is between stages, and of datatrove's logs and markers."""
    return directory.with_name(f".{directory.name}.datatrove")


def _check(name: str, source: Source) -> None:
    """Refuses what this engine does not do."""
    if source.max_tokens is not None:
        raise ValueError(
            f"data.sources.{name}.max_tokens: the engine datatrove has no limit of tokens, because its tasks do not "
            "count each other's: name fewer files with a glob, or use the own engine"
        )
    if is_saved_dataset(source):
        raise ValueError(
            f"data.sources.{name}.path is {source.path}, a directory of save_to_disk: the engine datatrove deals out "
            "files, so save it as parquet, or use the own engine"
        )


# --- stages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stage:
    name: str
    tasks: int
    steps: list[PipelineStep]


def _stages(work: SourceWork, quality: Quality) -> list[_Stage]:
    """Returns the pipelines of a source, in order."""
    # Absolute: a worker of Ray gets these folders before it is in this directory.
    between = (work.building / "between").absolute()
    made, read, write = MakeUnits(work), ReadUnits(work), WriteKept(work)
    join = _Stage("join", 1, [JoinShards(work)])
    match quality.deduplicate:
        case "none":
            return [_Stage("write", work.tasks, [made, read, write]), join]
        case "exact":
            tasks = min(_EXACT_TASKS, work.tasks)
            config = ExactDedupConfig(content_getter=_content_of, document_priority=_earlier_first)
            hashes, equal = str(between / "hashes"), str(between / "equal")
            return [
                _Stage("read", work.tasks, [made, read, ExactDedupSignature(hashes, config, finder_workers=tasks)]),
                _Stage("exact", tasks, [ExactFindDedups(hashes, equal, config, lines_to_buffer=1000)]),
                _Stage("write", work.tasks, [read, ExactDedupFilter(equal, config), write]),
                join,
            ]
        case "near":
            config = MinhashConfig(
                num_buckets=BANDS, hashes_per_bucket=PERMUTATIONS // BANDS, hash_config=HashConfig(precision=32)
            )
            drawn, pairs, removed = (str(between / folder) for folder in ("sketches", "pairs", "removed"))
            buckets = BANDS * -(-work.tasks // MOST_TASKS)
            find = MinhashDedupBuckets(drawn, pairs, config=config, lines_to_buffer=1000)
            cluster = MinhashDedupCluster(pairs, removed, config=config, lines_to_buffer=1000)
            return [
                _Stage("read", work.tasks, [made, WriteSketches(work, Path(drawn))]),
                _Stage("buckets", buckets, [find]),
                _Stage("clusters", 1, [cluster]),
                _Stage("write", work.tasks, [read, MinhashDedupFilter(removed), write]),
                join,
            ]


def _content_of(document: TroveDocument) -> bytes:
    # Bytes, because xxhash 4 takes no text.
    return str(document.text).encode()


def _earlier_first(document: TroveDocument) -> int:
    """Returns a priority. Of equal documents datatrove keeps that of the highest priority, so the first in order."""
    return int(np.iinfo(np.uint16).max - document.metadata["task"])


# --- steps of the pipelines -------------------------------------------------------------------------------------------


class MakeUnits(PipelineStep):
    """Turns the files of a task into units. Units that an earlier start made are kept. Yields nothing."""

    type, name = "📖 - READER", "rows, rules, benchmarks, tokens"

    def __init__(self, work: SourceWork) -> None:
        super().__init__()
        self.work = work

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[TroveDocument]:
        for number, rows in enumerate(self._rows(rank)):
            unit = self.work.unit(rank, number)
            if not self.work.job.path(unit).exists():
                with self.work.keeping_refusal(rank), self.track_time("unit"):
                    documents, tokens = make_unit(self.work.job, unit, rows)
                self.stat_update("documents", value=documents, unit="unit")
                self.stat_update("tokens", value=tokens, unit="unit")
        yield from ()

    def _rows(self, task: int) -> Iterator[list[Span]]:
        """Yields the rows of each unit. A fetched file stays until its units are made."""
        rows: list[Span] = []
        for file in self.work.files[task]:
            is_remote = "://" in file
            with self.work.keeping_refusal(task):
                path = _fetched(file, self.work.fetched(task)) if is_remote else file
                found = spans(path, self.work.job.separator, TASK_UNIT_BYTES)
            for span in found:
                rows.append(span)
                if sum(row.weight for row in rows) >= TASK_UNIT_BYTES:
                    yield rows
                    rows = []
            if is_remote:
                if rows:
                    yield rows
                    rows = []
                os.remove(path)
        if rows:
            yield rows


def _fetched(address: str, folder: Path) -> str:
    """Fetches a file and returns its path.

    Raises:
        ValueError: the file cannot be fetched.
    """
    import fsspec

    store, path = fsspec.core.url_to_fs(address)
    target = folder / PurePosixPath(path).name
    try:
        with new_file(target) as partial:
            store.get_file(path, str(partial))
    except Exception as error:
        if isinstance(error, OSError) and str(error.filename or "").startswith(str(folder)):
            raise  # a full disk here
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{address} cannot be fetched ({reason}): run the command again when it can be") from error
    return str(target)


class ReadUnits(PipelineStep):
    """Yields the documents of a task's units. `text` is the hash of the text, which stands for the text."""

    type, name = "📖 - READER", "units"

    def __init__(self, work: SourceWork) -> None:
        super().__init__()
        self.work = work

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[TroveDocument]:
        if data is not None:
            deque(data, maxlen=0)
        for number, unit in enumerate(self.work.units(rank)):
            for place, hashed in enumerate(load_part(self.work.job.path(unit), "hashes").tolist()):
                metadata = {"task": rank, "unit": number, "place": place}
                yield TroveDocument(text=f"{hashed:016x}", id=f"{rank}/{number}/{place}", metadata=metadata)


class WriteSketches(PipelineStep):
    """Writes the sketches of a task's documents as datatrove's signatures: for each band a file of sorted records."""

    type, name = "🫂 - DEDUP", "sketches"

    def __init__(self, work: SourceWork, folder: Path) -> None:
        super().__init__()
        self.work, self.folder = work, folder

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        deque(data, maxlen=0)
        parts = [load_part(self.work.job.path(unit), "sketches") for unit in self.work.units(rank)]
        sketches = np.concatenate([np.empty((0, PERMUTATIONS), np.uint32), *parts])
        self.stat_update("documents", value=len(sketches), unit="task")
        for band, values in enumerate(np.split(sketches, BANDS, axis=1)):
            order = np.lexsort(values.T[::-1])
            records = np.column_stack([values[order], order.astype(np.uint32)]).astype("<u4")
            with new_file(self.folder / f"bucket_{band:03d}" / f"{rank:05d}.minhash.sig") as partial:
                records.tofile(partial)


class WriteKept(PipelineStep):
    """Writes the units that lose documents again, without them, and a summary of the task."""

    type, name = "🔢 - WRITER", "shards"

    def __init__(self, work: SourceWork) -> None:
        super().__init__()
        self.work = work

    def run(self, data: Iterable[TroveDocument], rank: int = 0, world_size: int = 1) -> None:
        if self.work.summary(rank).exists():
            return
        places: dict[int, list[int]] = defaultdict(list)  # number of the unit in the task → its documents that stay
        for document in data:
            places[document.metadata["unit"]].append(document.metadata["place"])
        # Only now, because the steps before may have made the units.
        job, units = self.work.job, list(self.work.units(rank))
        kept = [np.zeros(len(load_part(job.path(unit), "hashes")), dtype=bool) for unit in units]
        for number, keep in enumerate(kept):
            keep[places[number]] = True
        for unit, keep in zip(units, kept, strict=True):
            if not keep.all():
                write_kept(job, unit, keep)
        write_sealed(self.work.summary(rank), self._account(rank, units, kept))

    def _account(self, task: int, units: list[int], kept: list[NDArray[np.bool_]]) -> dict[str, Any]:
        """Returns the sums of the units' accounts, and where the shards of each unit are."""
        job = self.work.job
        sums: Counter[str] = Counter()
        counters: dict[str, Counter[str]] = {"filtered": Counter(), "found_in": Counter()}
        rejected: list[BadRow] = []
        found_rows: set[int] = set()
        parts = []
        last: Any = None
        for number, keep in zip(units, kept, strict=True):
            unit = load_unit(job.path(number))
            account = unit.account
            folder, splits = job.path(number), account["splits"]
            if not keep.all():
                folder, splits = job.path_of_kept(number), kept_splits(job, number)
            parts.append({"folder": str(folder.relative_to(self.work.building)), "splits": splits})
            sums.update({name: account[name] for name in ("read", "cut", "contaminated", "seconds")})
            sums["documents"] += len(keep)
            sums["bytes"] += int(unit.sizes[keep].sum())
            sums["cut"] += account["first"] is not None and account["first"] == last
            last = account["last"] or last
            for name, counter in counters.items():
                counter.update(account[name])
            rejected += account["rejected"]
            found_rows.update(account["found_rows"])
        fetched = f"{self.work.fetched(task)}{os.sep}"
        rows = [
            row._replace(file=row.file.replace(fetched, ""), message=row.message.replace(fetched, ""))
            for row in rejected
        ]
        return {
            **sums,
            **counters,
            "rejected": [row._asdict() for row in rows],
            "found_rows": sorted(found_rows),
            "parts": parts,
        }


class JoinShards(PipelineStep):
    """Lists the files of all tasks in shards.json, writes report.json, and gives the directory its name."""

    type, name = "🔢 - WRITER", "join"

    def __init__(self, work: SourceWork) -> None:
        super().__init__()
        self.work = work

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        if not (self.work.directory / "shards.json").exists():
            with self.work.keeping_refusal(rank):
                self._join()

    def _join(self) -> None:
        work, folder = self.work, self.work.building / "shards"
        sums: Counter[str] = Counter()
        counters: dict[str, Counter[str]] = {name: Counter() for name in ("filtered", "rejected", "found_in")}
        found_rows: set[int] = set()
        first: list[str] = []
        parts: dict[str, list[tuple[Path, dict[str, Any]]]] = {split: [] for split in SPLITS}
        shutil.rmtree(folder, ignore_errors=True)  # of a join that was killed
        folder.mkdir()
        with new_file(folder / "rejected.jsonl") as partial, partial.open("w", encoding="utf-8", newline="\n") as out:
            for task in range(work.tasks):
                summary = read_sealed(work.summary(task), f"remove {work.building} to begin again")
                for part in summary["parts"]:
                    for split, there in part["splits"].items():
                        parts[split].append((work.building / part["folder"], there))
                        for file in there["files"]:
                            link_or_copy(work.building / part["folder"] / file["name"], folder / file["name"])
                names = ("bytes", "read", "cut", "contaminated", "documents", "seconds")
                sums.update({name: summary.get(name, 0) for name in names})
                counters["filtered"].update(summary["filtered"])
                counters["found_in"].update(summary["found_in"])
                counters["rejected"].update(row["cause"] for row in summary["rejected"])
                found_rows.update(summary["found_rows"])
                out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in summary["rejected"])
                first += [row["message"] for row in summary["rejected"][: SHOWN_REJECTIONS - len(first)]]
        if not first:
            os.remove(folder / "rejected.jsonl")
        splits = {split: joined_splits(folder, split, parts[split]) for split in SPLITS}
        documents, tokens = (sum(split[what] for split in splits.values()) for what in ("documents", "tokens"))
        duplicates = {"exact": sums["documents"] - documents, "near": 0}
        if work.meta["quality"]["deduplicate"] == "near":
            duplicates = {"near": duplicates["exact"]}  # among them equal texts, which datatrove does not tell apart
        counts = {
            "documents": documents,
            "tokens": tokens,
            "bytes_per_token": round(sums["bytes"] / max(1, tokens), 4),
            "documents_read": sums["read"],
            "pieces_of_long_documents": sums["cut"],
            "rejected": dict(sorted(counters["rejected"].items())),
            "filtered": dict(sorted(counters["filtered"].items())),
            "contaminated": sums["contaminated"],
            "duplicates": duplicates,
            "benchmarks": contamination(work.job, found_rows, counters["found_in"]),
        }
        if not tokens:
            lost = sum(counters["rejected"].values()) + sum(counters["filtered"].values()) + sums["contaminated"]
            raise nothing_left(work.name, work.path, lost)
        report = {
            "source": work.name,
            **counts,
            "first_rejected": first,
            "seconds": round(time.time() - work.began, 3),
            "seconds_of_all_processes": round(sums["seconds"], 3),
            "engine": work.meta["engine"],
        }
        write_json(folder / "report.json", report)
        write_json(folder / "shards.json", {**work.meta, "counts": counts, "splits": splits})
        finish_folder(folder, work.directory)


# --- executors --------------------------------------------------------------------------------------------------------


class _LocalExecutor(LocalPipelineExecutor):
    """Runs the tasks in processes that end with this one, and leaves Ctrl-C to this process.

    datatrove's own pool goes on after a kill of the process that started it, and prints a traceback for each process.
    """

    def run(self) -> None:
        ranks = self.get_incomplete_ranks()
        if self.workers == 1 or len(ranks) < 2:
            for rank in ranks:
                _run_rank(deepcopy(self), rank)
            return
        others = set(multiprocessing.active_children())
        with WorkerPool(min(self.workers, len(ranks))) as pool:
            try:
                for _ in pool.map(partial(_run_rank, self), ranks):
                    pass
            except BaseException:
                # A task may take hours, and the next start makes what is missing.
                for process in set(multiprocessing.active_children()) - others:
                    process.kill()
                raise


class _RayExecutor(RayPipelineExecutor):
    """Runs the tasks in the directory of this process, as the other executors do.

    Ray starts its workers where the cluster was started, and paths of texts may be relative.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.directory = os.getcwd()

    def _run_for_rank(self, rank: int, local_rank: int = 0, node_rank: int = -1) -> Any:
        os.chdir(self.directory)
        return super()._run_for_rank(rank, local_rank, node_rank)


def _run_rank(executor: PipelineExecutor, rank: int) -> None:
    with _quietly():
        executor._run_for_rank(rank)


@contextmanager
def _quietly() -> Iterator[None]:
    """Keeps datatrove's log off the terminal. Its files keep the log, and errors go on as exceptions."""
    with open(os.devnull, "w") as nowhere:
        try:
            with redirect_stderr(nowhere):
                setup_default_logger()
                yield
        finally:
            setup_default_logger()


def _run(work: SourceWork, quality: Quality, cluster: Cluster) -> None:
    """Runs what is missing of a source, or with SLURM submits it.

    Raises:
        ValueError: a text is damaged, a task failed, or jobs of an earlier call still run.
    """
    (work.building / "tasks").mkdir(exist_ok=True)
    try:
        if cluster.where == "slurm":
            _submit(work, quality, cluster)
        else:
            _run_stages(work, quality, cluster)
    except DamagedFile as error:
        # The texts or the options have to change, and then nothing of this directory is of use.
        shutil.rmtree(work.building, ignore_errors=True)
        raise ValueError(str(error)) from error
    except BrokenProcessPool as error:
        raise ValueError(
            "a process of a task was ended from outside (was memory short?): run it again, and it continues where it "
            "stopped, with --processes for fewer at once"
        ) from error


def _run_stages(work: SourceWork, quality: Quality, cluster: Cluster) -> None:
    with _quietly():
        stages = _stages(work, quality)
    for stage in stages:
        with _quietly():
            executor = _executor(work, stage, cluster)
        if missing := len(executor.get_incomplete_ranks()):
            began = time.monotonic()
            if cluster.where == "ray":
                _run_on_ray(work, executor)
            else:
                executor.run()
            done = (
                f"{stage.tasks - missing} of {counted(stage.tasks, 'task was', 'tasks were')} done, "
                if missing < stage.tasks
                else ""
            )
            tell(f"{work.name}: {stage.name}: {done}{missing} took {time.monotonic() - began:.1f} s")


def _executor(
    work: SourceWork, stage: _Stage, cluster: Cluster, before: PipelineExecutor | None = None
) -> PipelineExecutor:
    # Absolute, as the folders between the stages are.
    logs = str((work.building / "logs" / stage.name).absolute())
    workers = -1 if cluster.workers is None else cluster.workers
    if cluster.where == "local":
        return _LocalExecutor(stage.steps, stage.tasks, workers, logs)
    if cluster.where == "ray":
        return _RayExecutor(stage.steps, stage.tasks, workers, logging_dir=logs)
    # Else the jobs behind a task that failed would wait in the queue for ever.
    options = {"kill-on-invalid-dep": "yes", **cluster.slurm}
    return SlurmPipelineExecutor(
        stage.steps,
        stage.tasks,
        time=options.pop("time"),
        partition=options.pop("partition"),
        qos=options.pop("qos", None),
        sbatch_args=options,
        workers=workers,
        job_name=f"{_job_prefix(work)}{stage.name}",
        logging_dir=logs,
        depends=before,
        env_command=f"export PATH={shlex.quote(os.path.dirname(sys.executable))}:$PATH",
    )


def _run_on_ray(work: SourceWork, executor: PipelineExecutor) -> None:
    import ray

    with _quietly():
        try:
            ray.init(ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:  # Ray has no class for the failures of its start
            address = os.environ.get("RAY_ADDRESS")
            where = f"at RAY_ADDRESS={address} is not within reach" if address else "does not start on this machine"
            raise ValueError(
                f"--executor ray: Ray {where} ({first_line(error)}): see ray status, and try again"
            ) from error
        executor.run()
    if left := executor.get_incomplete_ranks():
        work.raise_refusal()
        raise ValueError(
            f"{amount(len(left), 'task')} failed: {executor.logging_dir.path}/logs says why; run the command again"
        )


def _submit(work: SourceWork, quality: Quality, cluster: Cluster) -> None:
    try:
        queued = [name for name in get_running_slurm_jobs() if name.startswith(_job_prefix(work))]
    except FileNotFoundError:
        raise ValueError(
            "--executor slurm: there is no squeue here: use a machine that can submit SLURM jobs"
        ) from None
    if queued:
        raise ValueError(
            f"source {work.name!r}: the job {queued[0]} of an earlier call is still in the queue: wait for it, or "
            "cancel it with scancel"
        )
    work.raise_refusal()
    executor: PipelineExecutor | None = None
    with _quietly():
        for stage in _stages(work, quality):
            executor = _executor(work, stage, cluster, executor)
        assert executor is not None
        try:
            executor.run()
        except (subprocess.CalledProcessError, FileNotFoundError):
            raise ValueError("sbatch took no job: see its own message above, and --slurm") from None
    tell(
        f"{work.name}: {counted(work.tasks, 'task is', 'tasks are')} submitted, the last job is "
        f"{executor.job_id}: run the same command when "
        "it is over; it shows the result, or submits what is missing"
    )


def _job_prefix(work: SourceWork) -> str:
    return f"{work.directory.name}-"
