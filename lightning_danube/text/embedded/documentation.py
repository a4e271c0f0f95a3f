"""A pre-training corpus without a network: the documentation in the installed Python packages.

The docstrings and READMEs of a fixed list of distributions (`docstrings.DISTRIBUTIONS`) and of the standard library are
collected into five sources, one for each source of the paper. They are English about programming. None of the text is
from the web, from Wikipedia, from papers, from a language model or from people who wrote instructions.

* `web`: the docstrings that `academic` does not take, and the READMEs of the distributions.
* `wiki`: the reference topics of the Python language (`pydoc_data`) and the docstrings of the standard library.
* `academic`: the docstrings of the packages and modules in `docstrings.ACADEMIC`: numerics, algebra, graphs, metrics.
* `synthetic`: passages about modules, as in a textbook. Templates make them from signatures and first sentences. In the
  paper, a language model wrote this part.
* `instruct`: questions and answers that templates make from the same material, as plain text.

The first three sources hold prose: `prose.py` removes markup, code, tables and formulas. They take docstrings of more
than one sentence, of which at least `docstrings.SHORTEST` characters are prose. The last two see only first sentences
and signatures. A hash of a module's name decides which of the two gets the module. No text is in two sources.

Packages are read, never imported. The same versions give the same bytes, for any number of processes.

The readings of each finished package stay on disk until all packages are read. A stopped collection resumes from them.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lightning_danube.files import locked, naming_cached, new_folder, read_json, write_text
from lightning_danube.terminal import tell
from lightning_danube.text.embedded.docstrings import (
    FORMAT,
    CollectedDocument,
    Entry,
    Environment,
    Module,
    Parameter,
    Reading,
    Seen,
    SourceFile,
    collected_documents,
    read_all,
    readmes,
    role_of,
)
from lightning_danube.text.embedded.made_text import facts_about_module, passages_about, pick, questions_about
from lightning_danube.text.worker_pool import WorkerPool

_PROCESSES_WORTH_STARTING = 16
_FILES_PER_CHUNK = 16

ROLES = ("web", "wiki", "academic", "synthetic", "instruct")


def collect_documentation(cache_dir: Path, *, processes: int | None = None, progress: bool = True) -> dict[str, Path]:
    """Collects the documentation of the running environment. Returns role → JSONL file of {"text", "origin"} rows.

    The documentation is collected once per combination of versions of Python and the distributions. The files and a
    `manifest.json` are kept in `cache_dir`. A call after one that was stopped, also by `kill -9`, reads only the
    packages that were not read to their end. One process collects at a time, and others wait for its files.

    Args:
        cache_dir: folder for the files, made if missing.
        processes: number of processes that read files, by default one per core. They are spawned, so a script that
            calls this needs the usual `if __name__ == "__main__"`, unless it asks for one process.
        progress: whether to report progress on stderr.

    Raises:
        ValueError: a source would be empty, because the interpreter has no sources or no documentation.
    """
    return _collect(Environment.running(), cache_dir, processes=processes, progress=progress)


def is_collected(cache_dir: Path) -> bool:
    """Returns whether the documentation is collected already, so `collect_documentation` would return at once."""
    folder = cache_dir / f"documentation-{Environment.running().fingerprint()}"
    return _is_complete({role: folder / f"{role}.jsonl" for role in ROLES})


def _collect(environment: Environment, cache_dir: Path, *, processes: int | None, progress: bool) -> dict[str, Path]:
    fingerprint = environment.fingerprint()
    folder = cache_dir / f"documentation-{fingerprint}"
    files = {role: folder / f"{role}.jsonl" for role in ROLES}
    parts = folder.with_name(f".{folder.name}.parts")
    if _is_complete(files):
        shutil.rmtree(parts, ignore_errors=True)  # a process that was killed after its last file has left them
        return files
    with locked(folder.with_name(f".{folder.name}.lock"), f"the collected documentation ({folder})", wait=tell):
        if not _is_complete(files):  # another process may have collected while this one waited
            _collect_now(environment, fingerprint, files, parts, processes=processes, progress=progress)
    return files


def _collect_now(
    environment: Environment,
    fingerprint: str,
    files: dict[str, Path],
    parts: Path,
    *,
    processes: int | None,
    progress: bool,
) -> None:
    start = time.monotonic()
    lively = progress and sys.stderr.isatty()
    if progress and not lively:
        tell("Collecting text from the installed packages (once for their versions) ...")
    readings = read_sources(environment.sources(), processes, lively, parts)
    documents, manifest = collected_sources(environment, readings)
    for role in ROLES:
        if not documents[role]:
            raise ValueError(
                f"no documentation was found for the source {role!r} under {', '.join(map(str, environment.packages))} "
                f"and {environment.stdlib}: install the dependencies there as source files, or use data of your own"
            )
    manifest = {"format": FORMAT, "fingerprint": fingerprint, "python": platform.python_version(), **manifest}
    _write(files, documents, manifest)
    shutil.rmtree(parts, ignore_errors=True)
    if progress:
        counts = ", ".join(f"{role} {len(documents[role]):,}" for role in ROLES)
        tell(f"Collected documents: {counts}, in {time.monotonic() - start:.0f} s.")


def read_sources(sources: Sequence[SourceFile], processes: int | None, lively: bool, parts: Path) -> list[Reading]:
    """Reads all files. Returns the results in the order of `sources`.

    Args:
        parts: folder of what was read, one file for each package. Packages that it holds are not read again.

    Raises:
        ValueError: another program ended a process, or a file of `parts` is damaged.
    """
    if processes is not None and processes < 1:
        raise ValueError(f"processes is {processes}: give at least 1, or None for one per core")
    readings: dict[str, list[Reading]] = {}
    todo: list[tuple[str, list[SourceFile]]] = []
    for package, group in groupby(sources, key=lambda source: source.package):
        files = list(group)
        known = _kept(parts / f"{package}.json")
        readings[package] = known
        if len(known) != len(files):
            todo.append((package, files))
    chunks = [chunk for _, files in todo for chunk in _chunks(files)]
    processes = max(1, min(processes or min(os.cpu_count() or 1, _PROCESSES_WORTH_STARTING), len(chunks)))
    with (
        tqdm(total=len(sources), desc="Collecting text", unit=" files", disable=not lively, leave=False) as bar,
        _read_in(processes, chunks) as results,
    ):
        bar.update(len(sources) - sum(map(len, chunks)))
        for package, files in todo:
            n_chunks = len(_chunks(files))
            readings[package] = [""] * len(files)
            for number in range(n_chunks):
                result = next(results)
                readings[package][number::n_chunks] = result
                bar.update(len(result))
            _keep(parts / f"{package}.json", readings[package])
    return [reading for read in readings.values() for reading in read]


def _chunks(files: list[SourceFile]) -> list[list[SourceFile]]:
    # Neighbours are alike (large files of one folder), so each chunk takes files from the whole package.
    n_chunks = -(-len(files) // _FILES_PER_CHUNK)
    return [files[number::n_chunks] for number in range(n_chunks)]


@contextmanager
def _read_in(processes: int, chunks: list[list[SourceFile]]) -> Iterator[Iterator[list[Reading]]]:
    """Yields the results of `read_all`, in the order of the chunks."""
    if processes == 1:
        yield map(read_all, chunks)
        return
    try:
        # Syntax trees have no cycles, and the search for cycles would take a fifth of the time.
        with WorkerPool(processes, gc.disable) as pool:
            yield pool.map(read_all, chunks)
    except BrokenProcessPool as error:
        raise ValueError(
            "a process that collects text was ended from outside (is memory short?): run the command again, and it "
            "continues where it stopped"
        ) from error


def _keep(file: Path, readings: list[Reading]) -> None:
    rows = [reading if isinstance(reading, str) else asdict(reading) for reading in readings]
    write_text(file, json.dumps({"readings": rows}))


def _kept(file: Path) -> list[Reading]:
    """Returns what an earlier call read of a package; nothing if it was not read to its end."""
    if not file.exists():
        return []
    with naming_cached(file):
        return [row if isinstance(row, str) else _module(row) for row in read_json(file)["readings"]]


def _module(row: dict[str, Any]) -> Module:
    return Module(**{**row, "entries": tuple(map(_entry, row["entries"]))})


def _entry(row: dict[str, Any]) -> Entry:
    parameters = row["parameters"]
    parameters = None if parameters is None else tuple(Parameter(**one) for one in parameters)
    return Entry(**{**row, "parameters": parameters, "bases": tuple(row["bases"]), "methods": tuple(row["methods"])})


def collected_sources(
    environment: Environment, readings: Sequence[Reading]
) -> tuple[dict[str, list[CollectedDocument]], dict[str, Any]]:
    """Returns the documents of every role, and their part of the manifest."""
    modules = [reading for reading in readings if isinstance(reading, Module)]
    skipped = Counter(reading for reading in readings if isinstance(reading, str))
    documents: dict[str, list[CollectedDocument]] = {role: [] for role in ROLES}

    # A repeated text stays in the source that is read first: "wiki", then "academic", then "web". Within a role, topics
    # come before docstrings.
    seen = Seen()
    for role in ("wiki", "academic", "web"):
        if role == "web":
            documents[role] += [document for document in readmes(environment) if not seen.repeats(document.text)]
        for module in sorted((m for m in modules if role_of(m) == role), key=lambda m: not m.topics):
            documents[role] += collected_documents(module, seen)

    used: set[bytes] = set()
    for module in modules:
        facts = facts_about_module(module, used)
        if facts:
            role = pick(("synthetic", "instruct"), module.name)
            documents[role] += passages_about(facts) if role == "synthetic" else questions_about(facts)

    counts = {
        role: {
            "documents": len(documents[role]),
            "characters": sum(len(document.text) for document in documents[role]),
            "packages": len({document.package for document in documents[role]}),
        }
        for role in ROLES
    }
    manifest = {
        "sources": counts,
        "files": {"found": len(readings), "read": len(modules), "skipped": dict(sorted(skipped.items()))},
        "repetitions_dropped": {"exact": seen.exact, "near": seen.near},
        "distributions": [
            f"{distribution.name}=={distribution.version}" for distribution in environment.distributions()
        ],
    }
    return documents, manifest


def _write(files: dict[str, Path], documents: dict[str, list[CollectedDocument]], manifest: dict[str, Any]) -> None:
    folder = files["web"].parent
    # A folder that was complete may have lost a file.
    with new_folder(folder, replace=folder.is_dir() and not _is_complete(files)) as partial:
        for role, file in files.items():
            with open(partial / file.name, "w", encoding="utf-8", newline="\n") as stream:
                for document in documents[role]:
                    row = {"text": document.text, "origin": f"{document.package}:{document.origin}"}
                    stream.write(json.dumps(row, ensure_ascii=False) + "\n")
        with open(partial / "manifest.json", "w", encoding="utf-8", newline="\n") as stream:
            stream.write(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")


def _is_complete(files: dict[str, Path]) -> bool:
    return all(file.is_file() for file in files.values())
