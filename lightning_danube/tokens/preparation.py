"""Makes token shards from texts: cuts sources into units, lets processes or machines make them, and joins the units.

The files of the units are the shards, so joining copies nothing: the shard directory gets links to them. Only units
that lose documents (duplicates, or those behind `max_tokens`) are written a second time, by all processes.

The bytes of a shard directory depend only on the texts and the options. They do not depend on which process made which
unit, or on interruptions. The exception is report.json, which also holds times.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_danube.files import locked, naming_cached, new_file, new_folder, read_sealed, write_sealed, write_text
from lightning_danube.terminal import counted, tell
from lightning_danube.text.corpora import Source, documents_and_bad_rows, is_streamed, local_files, read_stream
from lightning_danube.text.duplicates import drop_exact, drop_near
from lightning_danube.text.quality import BenchmarkFile, Benchmarks, Quality
from lightning_danube.text.reading import BadRow, DamagedFile, Document, Span, format_of, spans
from lightning_danube.text.worker_pool import WorkerPool
from lightning_danube.tokens.encoding import can_encode_in_parts
from lightning_danube.tokens.finished_shards import fetch_listing, is_finished
from lightning_danube.tokens.foreign.listing import ForeignTokens, list_token_files
from lightning_danube.tokens.shards import SPLITS, ShardFacts, TokenShards, joined_splits
from lightning_danube.tokens.tokenizer import DocumentTokenizer
from lightning_danube.tokens.units import Job, Unit, kept_splits, load_part, load_unit, make_unit, write_kept

UNIT_BYTES = 1 << 22
"""Bytes of text of a unit, about a second of work. A source of more than `MOST_UNITS` such units has larger units."""
MOST_UNITS = 1 << 12
MOST_TOKENS = 10**12
"""Tokens of a source that this engine prepares: about a billion documents, and shards of 0.5 GB."""
BYTES_PER_TOKEN = 4
"""Estimate, before a text is tokenized."""
STREAMED_DOCUMENTS = 2048
"""Documents in a unit of a streamed source."""
WORTH_PROCESSES = 1 << 23
"""Bytes of text below which starting processes costs more than it saves."""
SHOWN_REJECTIONS = 5

ForEach = Callable[..., Iterable[Any]]
WorkPart = tuple[int, int]
"""(number of the part, from 1; number of parts). Each machine does one part of the work."""


def prepare(
    sources: Mapping[str, Source],
    tokenizer: DocumentTokenizer,
    *,
    held_out: float,
    quality: Quality,
    cache_dir: Path,
    processes: int,
    part: WorkPart | None = None,
) -> dict[str, float]:
    """Makes the missing shards of all sources. Returns source → seconds, 0 for shards that existed already.

    Token files of other tools are checked and listed; nothing else is made of them.

    With `part`, makes every n-th unit, where n is the number of parts. The machine that makes the last missing unit
    joins all units. Without `part`, one process at a time prepares a source, and the others wait for its shards.

    Raises:
        ValueError: a source cannot be read or holds no text, or another program ended a process.
    """
    seconds = dict.fromkeys(sources, 0.0)
    found: dict[str, ShardFacts] = {}
    for name, source in sources.items():
        if source.has_tokens:
            directory, seconds[name] = list_token_files(name, source, tokenizer, held_out, cache_dir)
            if (doubt := ForeignTokens(directory, source, tokenizer, cache_dir).doubt()) is not None:
                tell(f"source {name!r}: {doubt}")
        elif is_finished(source.path):
            began = time.monotonic()
            fetch_listing(name, source.path, cache_dir)
            seconds[name] = time.monotonic() - began
        else:
            found[name] = ShardFacts(name, source, tokenizer, held_out, quality, cache_dir)
    places = {name: facts.directory() for name, facts in found.items()}
    with ExitStack() as locks:
        # In one order in all processes, so that two of them never wait for each other.
        for name in sorted(places, key=lambda name: places[name]):
            if not _is_made(places[name]):
                lock = places[name].with_name(f".{places[name].name}.lock")
                locks.enter_context(locked(lock, f"source {name!r} ({lock})", wait=tell, shared=part is not None))
        todo = [
            Preparation(places[name], facts, part=part)
            for name, facts in found.items()
            if not _is_made(places[name])  # another process may have made it while this one waited
        ]
        if todo:
            benchmarks = Benchmarks.read(quality.decontaminate) if quality.decontaminate else None
            _Workshop(todo, benchmarks, processes).run()
            seconds |= {preparation.facts.name: preparation.seconds for preparation in todo}
    return seconds


def _is_made(directory: Path) -> bool:
    """Returns whether shards are complete. Removes the units that a process killed after its join has left."""
    made = (directory / "shards.json").exists()
    if made:
        shutil.rmtree(building_directory(directory), ignore_errors=True)
    return made


@dataclass(frozen=True)
class Sample:
    """Shards of the first rows of a source.

    Args:
        shards: None if no document may be kept.
        unit: the documents before duplicates are removed, and counts of the rows left out.
        duplicates: number of documents removed as duplicates.
        complete: whether the whole source was read.
    """

    shards: TokenShards | None
    unit: Unit
    duplicates: int
    complete: bool


def prepare_sample(directory: Path, facts: ShardFacts, *, rows: int) -> Sample:
    """Makes shards of the first rows of a source, as `prepare` does. Rows that cannot be read are left out.

    Args:
        directory: a directory that does not exist yet.
        rows: most rows; reading also stops after `UNIT_BYTES` characters.

    Raises:
        ValueError: the source cannot be opened, or a file cannot be read as a whole.
    """
    decontaminate = facts.quality.decontaminate
    preparation = Preparation(directory, replace(facts, source=replace(facts.source, on_bad_row="skip")))
    preparation.open(Benchmarks.read(decontaminate) if decontaminate else None)
    taken: list[Document | BadRow] = []
    characters, complete = 0, True
    for row in documents_and_bad_rows(facts.name, facts.source, facts.cache_dir):
        if len(taken) == rows or characters >= UNIT_BYTES:
            complete = False
            break
        taken.append(row)
        characters += len(row.text) if isinstance(row, Document) else 0
    make_unit(preparation.job, 0, taken)
    preparation.units = preparation.used = 1
    unit = load_unit(preparation.job.path(0))
    if not len(unit.lengths):
        return Sample(None, unit, 0, complete)
    preparation.join()
    shards = TokenShards(directory, facts.tokenizer)
    return Sample(shards, unit, sum(shards.meta["counts"]["duplicates"].values()), complete)


def building_directory(directory: Path) -> Path:
    """Returns the directory that collects the units of shards until they are joined."""
    return directory.with_name(f".{directory.name}.building")


class Preparation:
    """Turns one source into a shard directory: plans its units, and joins the units."""

    def __init__(
        self, directory: Path, facts: ShardFacts, *, part: WorkPart | None = None, building: Path | None = None
    ) -> None:
        self.directory, self.facts, self.part = directory, facts, part
        source, tokenizer, quality = facts.source, facts.tokenizer, facts.quality
        self.building = building or building_directory(directory)
        self.limit = math.inf if source.max_tokens is None else int(source.max_tokens)
        self.job = Job(
            building=self.building,
            column=source.text,
            separator=source.separator,
            skip_bad_rows=source.on_bad_row == "skip",
            bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
            dtype=tokenizer.dtype.name,
            in_parts=can_encode_in_parts(self.tokenizer_json()),
            held_out=facts.held_out,
            filters=quality.filters if source.filters else None,
            near=quality.deduplicate == "near",
            benchmarks=bool(quality.decontaminate),
        )
        self.units: int | None = None  # number of units; for a streamed source known at its end
        self.weight = 0
        self._tokens: dict[int, int] = {}  # unit → its tokens, of the units that are known to be made
        self.began, self.seconds = time.monotonic(), 0.0

    # --- units --------------------------------------------------------------------------------------------------------

    def open(self, benchmarks: Benchmarks | None) -> None:
        """Makes the directory that collects the units. After a kill, the units in it are kept."""
        (self.building / "units").mkdir(parents=True, exist_ok=True)
        if not self.job.tokenizer_file.exists():
            write_text(self.job.tokenizer_file, self.tokenizer_json())
        if benchmarks is not None and not self.job.benchmarks_file.exists():
            with new_file(self.job.benchmarks_file) as partial:
                benchmarks.save(partial)

    def tokenizer_json(self) -> str:
        text: str = self.facts.tokenizer.hf.backend_tokenizer.to_str()
        return text

    def plan(self, pool: Callable[[], Executor]) -> list[list[Span]]:
        """Returns the units of a source of files. The plan is saved, so it is computed once."""
        path = self.building / "plan.json"
        if path.exists():
            with naming_cached(path):
                return [[Span(*span) for span in unit] for unit in read_sealed(path)["units"]]
        source = self.facts.source
        files = local_files(self.facts.name, source, self.facts.cache_dir)
        sizes = {file: os.path.getsize(file) * (5 if file.endswith((".gz", ".zst")) else 1) for file in files}
        self._check_size(sum(sizes.values()) // BYTES_PER_TOKEN)
        size = max(UNIT_BYTES, -(-sum(sizes.values()) // MOST_UNITS))
        separators, limits = [source.separator] * len(files), [size] * len(files)
        # Lines are counted at the speed of the disk; other formats must be parsed.
        slow = sum(size for file, size in sizes.items() if format_of(file) != "parquet")
        found = pool().map(spans, files, separators, limits) if len(files) > 1 and slow > 1 << 28 else None
        units: list[list[Span]] = [[]]
        for file_spans in found if found is not None else map(spans, files, separators, limits):
            for span in file_spans:
                if sum(span.weight for span in units[-1]) >= size:
                    units.append([])
                units[-1].append(span)
        write_sealed(path, {"units": units})
        return units

    def _check_size(self, tokens: float) -> None:
        """Refuses a source that is too large for this engine.

        Args:
            tokens: what it holds, infinite if that is not known.
        """
        tokens = min(tokens, self.limit)
        if MOST_TOKENS < tokens < math.inf:
            raise ValueError(
                f"source {self.facts.name!r} has about {tokens:,.0f} tokens, more than the {MOST_TOKENS:,} of a source "
                "that this engine prepares: use prepare --engine datatrove, or set its max_tokens"
            )

    def work(self, pool: Callable[[], Executor]) -> Iterator[tuple[int, list[Span] | list[Document | BadRow], int]]:
        """Yields (number, rows, weight) of the missing units, in order."""
        self.began = time.monotonic()
        numbered: Iterator[tuple[int, Any]]
        if is_streamed(self.facts.source):
            self._check_size(math.inf)
            rows = read_stream(self.facts.name, self.facts.source)
            numbered = enumerate(iter(lambda: list(islice(rows, STREAMED_DOCUMENTS)), []))
        else:
            units = self.plan(pool)
            self.units, self.weight = len(units), sum(span.weight for unit in units for span in unit)
            numbered = enumerate(units)
        number = -1
        for number, unit in numbered:
            if self.part is not None and number % self.part[1] != self.part[0] - 1:
                continue
            if self.is_enough_before(number):
                return
            weight = sum(span.weight for span in unit) if self.units is not None else 0
            if self.job.path(number).exists():
                self.weight -= weight
                continue
            yield number, unit, weight
        if self.units is None:
            self.units = number + 1
            write_text(self.building / "units.json", str(self.units))

    def note(self, number: int, tokens: int) -> None:
        """Records that a unit is made."""
        self._tokens[number] = tokens

    def is_enough_before(self, number: int) -> bool:
        """Returns whether the units before this one hold `max_tokens`, those of all parts together.

        Units that other parts have not made yet count as much as the known ones. They are estimates, so there must be a
        tenth more than asked for.
        """
        if self.limit == math.inf:
            return False
        self._look_for_units()
        known = [tokens for unit, tokens in self._tokens.items() if unit < number]
        if sum(known) >= self.limit:
            return True
        if self.part is None or not known:
            return False
        mine, parts = self.part
        others = sum(unit % parts != mine - 1 and unit not in self._tokens for unit in range(number))
        return others > 0 and sum(known) * (1 + others / len(known)) >= 1.1 * self.limit

    def _look_for_units(self) -> None:
        """Records the units that other processes, or an earlier run, have made."""
        for name in os.listdir(self.building / "units"):
            if name.isdigit() and int(name) not in self._tokens:  # not one that is being written
                self._tokens[int(name)] = int(load_part(self.job.path(int(name)), "lengths").sum())

    # --- joining ------------------------------------------------------------------------------------------------------

    def missing(self) -> list[int]:
        """Returns the units that must still be made before the units can be joined.

        Of a streamed source whose end is not known, and with `max_tokens`, some of them are an estimate.
        """
        counted = self.building / "units.json"
        units = self.units if self.units is not None else int(counted.read_text()) if counted.exists() else None
        if self.limit < math.inf:
            self._look_for_units()
        missing: list[int] = []
        tokens, number = 0.0, 0
        while number != units and tokens < self.limit:
            found = number - len(missing)
            if self.job.path(number).exists():
                tokens += self._tokens.get(number, 0)
            else:
                missing.append(number)
                tokens += tokens / found if found else 0
                if units is None and not tokens:
                    break
            number += 1
        self.used = number
        return missing

    def join(self, for_each: ForEach = map) -> None:
        """Joins the units into the shard directory.

        Args:
            for_each: calls a function with arguments, as `map` does, perhaps in other processes.

        Raises:
            ValueError: no text is left.
        """
        kept, duplicates = self._kept()
        # Written beside the units, so that a killed join continues with those that are missing.
        changed = [number for number, keep in enumerate(kept) if not keep.all()]
        for _ in for_each(partial(write_kept, self.job), changed, [kept[number] for number in changed]):
            pass
        with new_folder(self.directory) as building:
            self._join_into(building, kept, duplicates)
        shutil.rmtree(self.building, ignore_errors=True)

    def _join_into(self, building: Path, kept: list[NDArray[np.bool_]], duplicates: dict[str, int]) -> None:
        total: Counter[str] = Counter()
        filtered: Counter[str] = Counter()
        rejected: Counter[str] = Counter()
        found_rows: set[int] = set()
        found_in: Counter[str] = Counter()
        first: list[BadRow] = []
        last: list[Any] | None = None  # file and row where the unit before ended
        seconds = 0.0
        parts: dict[str, list[tuple[Path, dict[str, Any]]]] = {split: [] for split in SPLITS}
        rejections = open(building / "rejected.jsonl", "w", encoding="utf-8", newline="\n")  # noqa: SIM115
        with rejections:
            for number, keep in enumerate(kept):
                unit = load_unit(self.job.path(number))
                account = unit.account
                folder, own = self.job.path(number), account["splits"]
                if not keep.all():
                    folder, own = self.job.path_of_kept(number), kept_splits(self.job, number)
                for split in SPLITS:
                    parts[split].append((folder, own[split]))
                    for file in own[split]["files"]:
                        link_or_copy(folder / file["name"], building / file["name"])
                total["bytes"] += int(unit.sizes[keep].sum())
                for name in ("read", "cut", "contaminated"):
                    total[name] += account[name]
                total["cut"] += account["first"] is not None and account["first"] == last
                last = account["last"] or last
                filtered.update(account["filtered"])
                found_rows.update(account["found_rows"])
                found_in.update(account["found_in"])
                seconds += account["seconds"]
                for row in account["rejected"]:
                    rejected[row.cause] += 1
                    rejections.write(json.dumps(row._asdict(), ensure_ascii=False) + "\n")
                first += account["rejected"][: SHOWN_REJECTIONS - len(first)]
        if not first:
            os.remove(building / "rejected.jsonl")
        splits = {split: joined_splits(building, split, parts[split]) for split in SPLITS}
        documents, tokens = (sum(split[what] for split in splits.values()) for what in ("documents", "tokens"))
        if not tokens:
            lost = sum(rejected.values()) + sum(filtered.values()) + total["contaminated"]
            raise nothing_left(self.facts.name, self.facts.source.path, lost)
        counts = {
            "documents": documents,
            "tokens": tokens,
            "bytes_per_token": round(total["bytes"] / tokens, 4),
            "documents_read": total["read"],
            "pieces_of_long_documents": total["cut"],
            "rejected": dict(sorted(rejected.items())),
            "filtered": dict(sorted(filtered.items())),
            "contaminated": total["contaminated"],
            "duplicates": duplicates,
            "benchmarks": contamination(self.job, found_rows, found_in),
        }
        meta = {
            **self.facts.meta(),
            "counts": counts,
            "splits": splits,
        }
        self.seconds = time.monotonic() - self.began
        report = {
            "source": self.facts.name,
            **counts,
            "first_rejected": [row.message for row in first],
            "seconds": round(self.seconds, 3),
            "seconds_of_all_processes": round(seconds, 3),
        }
        _write_json(building / "shards.json", meta, indent=None)
        _write_json(building / "report.json", report, indent=1)

    def _kept(self) -> tuple[list[NDArray[np.bool_]], dict[str, int]]:
        """Returns for each unit which documents are kept, and the number of removed duplicates."""
        paths = [self.job.path(number) for number in range(self.used)]
        keep = []
        before = 0
        for path in paths:
            lengths = load_part(path, "lengths")
            wanted = np.ones(len(lengths), dtype=bool)
            if self.limit < math.inf:
                # The document that reaches the token limit is the last document that is kept.
                within = int(np.searchsorted(before + np.cumsum(lengths), self.limit)) + 1
                wanted[within:] = False
                before += int(lengths[:within].sum())
            keep.append(wanted)
        gone = {"exact": 0, "near": 0}
        if self.facts.quality.deduplicate == "none":
            return keep, gone
        every = np.concatenate(keep)
        borders = np.cumsum([len(wanted) for wanted in keep])[:-1]
        # The folder of the units is removed after the join.
        folder = self.building / "duplicates"
        folder.mkdir(exist_ok=True)
        gone["exact"] = drop_exact(every, (load_part(path, "hashes") for path in paths), folder)
        if self.facts.quality.deduplicate == "near":
            gone["near"] = drop_near(every, lambda: (load_part(path, "sketches") for path in paths), folder)
        return np.split(every, borders), gone


def contamination(job: Job, rows: set[int], documents: Counter[str]) -> list[dict[str, Any]]:
    """Returns for each benchmark file how many of its rows a source contained, and in how many documents.

    These documents were all removed.

    Args:
        rows: numbers of the rows that were found.
        documents: number of a benchmark file, as text → documents that contain its text.
    """
    if not job.benchmarks:
        return []
    benchmarks = Benchmarks.load(job.benchmarks_file)
    found = Counter(benchmarks.place_of(row)[0] for row in rows)

    def line(number: int, file: BenchmarkFile) -> dict[str, Any]:
        return {**vars(file), "rows_found": found[number], "documents": documents[str(number)]}

    return [line(number, file) for number, file in enumerate(benchmarks.files)]


def nothing_left(name: str, path: str, lost: int) -> DamagedFile:
    """Returns the error of a source without a document that may be kept. `lost` counts the rows that were left out."""
    reason = f" that may be kept: {counted(lost, 'row was', 'rows were')} rejected or removed" if lost else ""
    return DamagedFile(f"source {name!r} ({path}) holds no text{reason}")


class _Workshop:
    """Makes the units of several sources, in one or several processes, and joins each source when it is complete."""

    def __init__(self, preparations: Sequence[Preparation], benchmarks: Benchmarks | None, processes: int) -> None:
        self.preparations, self.benchmarks, self.processes = preparations, benchmarks, processes
        self._pool: WorkerPool | None = None
        self._progress = _Progress(preparations)

    def run(self) -> None:
        try:
            self._run()
        except BrokenProcessPool as error:
            raise ValueError(
                "a process that tokenizes was ended from outside (was memory short?): run it again and it continues "
                "where it stopped, with --processes for fewer"
            ) from error
        finally:
            self._progress.close()
            if self._pool is not None:
                self._pool.shutdown(cancel_futures=True)

    def _start_pool(self) -> WorkerPool:
        if self._pool is None:
            self._pool = WorkerPool(self.processes)
        return self._pool

    def _run(self) -> None:
        waiting: deque[tuple[Preparation, int, int, Any]] = deque()
        held: list[tuple[Preparation, int, Any, int]] = []
        weight = 0
        for preparation in self.preparations:
            self._guarded(preparation, lambda p: p.open(self.benchmarks))
            for number, rows, size in self._works(preparation):
                # Small sources finish faster than processes start, so the first units wait until there is enough work.
                weight += size or WORTH_PROCESSES // 16
                held.append((preparation, number, rows, size))
                if weight >= WORTH_PROCESSES and self.processes > 1:
                    self._start_pool()
                if self._pool is not None or self.processes == 1 or len(held) > 64:
                    self._hand_out(held, waiting)
            held.append((preparation, -1, None, 0))
        self._hand_out(held, waiting)
        while waiting:
            self._take(waiting)

    def _works(self, preparation: Preparation) -> Iterator[tuple[int, Any, int]]:
        work = preparation.work(self._start_pool)
        while (unit := self._guarded(preparation, lambda _: next(work, None))) is not None:
            yield unit

    def _hand_out(self, held: list[tuple[Preparation, int, Any, int]], waiting: deque[Any]) -> None:
        for preparation, number, rows, size in held:
            future: Any = None
            if number >= 0 and not preparation.is_enough_before(number):
                if self._pool is not None:
                    future = self._pool.submit(make_unit, preparation.job, number, rows)
                else:
                    future = _Done(self._guarded(preparation, partial(_make, number=number, rows=rows)))
            waiting.append((preparation, number, size, future))
            while len(waiting) > 2 * self.processes:
                self._take(waiting)
        held.clear()

    def _take(self, waiting: deque[tuple[Preparation, int, int, Any]]) -> None:
        preparation, number, size, future = waiting.popleft()
        if future is not None:
            documents, tokens = self._guarded(preparation, lambda _: future.result()) or (0, 0)
            preparation.note(number, tokens)
            self._progress.add(preparation, documents, tokens, size)
        elif number < 0:
            self._guarded(preparation, self._finish)

    def _finish(self, preparation: Preparation) -> None:
        missing = preparation.missing()
        if not missing:
            preparation.join(map if self._pool is None else self._pool.map)
            return
        if (preparation.directory / "shards.json").exists():
            return  # another process has joined the source and removed its units
        assert preparation.part is not None
        number, of = preparation.part
        parts = sorted({unit % of + 1 for unit in missing})
        named = ", ".join(f"{part}/{of}" for part in parts[:8]) + (" and others" if len(parts) > 8 else "")
        tell(
            f"{preparation.facts.name}: part {number} of {of} is made; {len(missing):,} of {preparation.used:,} units "
            f"are left to --shard {named}"
        )

    def _guarded(self, preparation: Preparation, do: Callable[[Preparation], Any]) -> Any:
        """Runs a step. Returns None if another process has finished the source and removed its units.

        A damaged text becomes a ValueError for the user. Without `part`, the units made so far are removed.
        """
        try:
            return do(preparation)
        except DamagedFile as error:
            if preparation.part is None:
                shutil.rmtree(preparation.building, ignore_errors=True)
            raise ValueError(str(error)) from error
        except FileNotFoundError:
            if not (preparation.directory / "shards.json").exists():
                raise
            return None


def _make(preparation: Preparation, number: int, rows: Any) -> tuple[int, int]:
    return make_unit(preparation.job, number, rows)


class _Done:
    """A future whose result this process has made itself."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self) -> Any:
        return self._value


class _Progress:
    """Shows a progress bar on a terminal, and elsewhere prints a line every `EVERY` seconds."""

    EVERY = 30.0

    def __init__(self, preparations: Sequence[Preparation]) -> None:
        from tqdm import tqdm

        self._preparations = preparations
        self._began = self._said = time.monotonic()
        self._documents = self._tokens = self._bytes = 0
        self._bar = tqdm(
            desc="tokenizing", unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False, smoothing=0.05
        )

    def add(self, preparation: Preparation, documents: int, tokens: int, size: int) -> None:
        self._documents += documents
        self._tokens += tokens
        self._bytes += size
        now = time.monotonic()
        seconds = max(now - self._began, 1e-9)
        rates = f"{self._documents / seconds:,.0f} documents/s, {self._tokens / seconds:,.0f} tokens/s"
        self._bar.total = sum(p.weight for p in self._preparations) or None
        self._bar.set_description(f"tokenizing {preparation.facts.name}", refresh=False)
        self._bar.set_postfix_str(rates, refresh=False)
        self._bar.update(size)
        if self._bar.disable and now - self._said >= self.EVERY:
            self._said = now
            total = sum(p.weight for p in self._preparations)
            share, left = "", ""
            if self._bytes and total:
                share = f" {self._bytes / total:.0%},"
                left = f", {_duration(seconds * max(0, total - self._bytes) / self._bytes)} left"
            tell(
                f"tokenizing {preparation.facts.name}:{share} {self._documents:,} documents, {self._tokens:,} tokens "
                f"({rates}){left}"
            )

    def close(self) -> None:
        self._bar.close()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def link_or_copy(path: Path, target: Path) -> None:
    """Gives a file a second name, or copies it where the file system has no links."""
    try:
        os.link(path, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
            raise
        shutil.copyfile(path, target)


def _write_json(path: Path, content: Any, indent: int | None) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def open_or_prepare(
    name: str,
    source: Source,
    tokenizer: DocumentTokenizer,
    *,
    held_out: float,
    cache_dir: Path,
    processes: int,
    quality: Quality | None = None,
) -> tuple[TokenShards | ForeignTokens, float]:
    """Returns the shards or token files of a source, and the seconds that making or checking them took, 0 if that was
    done before.

    New shards are checked against their checksums.

    Raises:
        ValueError: see `prepare` and `TokenShards`.
    """
    if source.has_tokens:
        directory, seconds = list_token_files(name, source, tokenizer, held_out, cache_dir)
        return ForeignTokens(directory, source, tokenizer, cache_dir), seconds
    facts = ShardFacts(name, source, tokenizer, held_out, quality or Quality(), cache_dir)
    options: dict[str, Any] = {"held_out": held_out, "quality": facts.quality, "cache_dir": cache_dir}
    seconds = prepare({name: source}, tokenizer, processes=processes, **options)[name]
    shards = facts.open()
    if seconds and not is_finished(source.path):
        shards.verify()
    return shards, seconds
